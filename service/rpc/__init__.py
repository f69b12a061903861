"""gRPC: translates messages to the denoiser and answers from it. Knows status codes; decides nothing else."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes to stderr, past the log, whatever callers send amiss
