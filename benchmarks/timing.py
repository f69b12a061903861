"""How long work takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CPU = torch.device("cpu")


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that `run` takes, up to the end of what it launches on a GPU."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
