"""How torch says that there is not enough memory."""

from __future__ import annotations

import torch

SHORTAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
"""The driver, the libraries under torch and a CPU's allocator run out of it in errors of other kinds."""


def shortage(error: RuntimeError | MemoryError) -> str | None:
    """What the error says if it says that, else None.

    Raise what follows from it outside of the `except` block: an error that has this one for its context keeps every
    tensor of the tick alive.
    """
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in said for name in SHORTAGES):
        return said or "out of memory"
    return None
