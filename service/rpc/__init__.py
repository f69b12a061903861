"""gRPC: translates messages to the denoiser and answers from it. Knows status codes; decides nothing else."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else its core writes callers' bad input to stderr, past the log
