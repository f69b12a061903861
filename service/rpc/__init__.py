"""gRPC: translates messages to the denoiser and answers from it. Knows status codes; decides nothing else."""
