"""How torch says that there is not enough memory."""

from __future__ import annotations

import torch

SHORTAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""The driver and the libraries under torch run out of it in errors of other kinds."""


def shortage(error: RuntimeError) -> str | None:
    """What the error says if it says that, else None.

    Raise what follows from it outside of the `except` block: an error that has this one for its context keeps every
    tensor of the tick alive.
    """
    said = str(error)
    return said if isinstance(error, torch.OutOfMemoryError) or any(name in said for name in SHORTAGES) else None
