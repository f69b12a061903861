"""Recognises the errors by which torch says that there is not enough memory."""

from __future__ import annotations

import torch

SHORTAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # which a full card has no room for
    "can't allocate memory",
    "not enough memory",
)
"""Messages of the driver, of libraries under torch, and of the CPU allocator, which raise other types of error."""


def shortage(error: RuntimeError | MemoryError) -> str | None:
    """The error's message if it is about memory, else None."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in said for name in SHORTAGES):
        return said or "out of memory"
    return None
