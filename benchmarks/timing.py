"""How long work takes, and how fast it could be."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

CPU = torch.device("cpu")
PEAK_REPEATS = 20


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that `run` takes, up to the end of what it launches on a GPU."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def matrix_peak(
    n_rows: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> float:
    """FLOP/s of a product of `(n_rows, d_in)` and `(d_in, d_out)`, repeated: the best of three times, once warm."""
    rows, weight = (torch.randn(n, d_in, device=device, dtype=dtype) for n in (n_rows, d_out))

    def products() -> None:
        for _ in range(PEAK_REPEATS):
            linear(rows, weight)

    products()
    return 2 * n_rows * d_in * d_out * PEAK_REPEATS / min(seconds(products, device) for _ in range(3))
