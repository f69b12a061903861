"""On how many rows products are carried out: dead rows of zeros are added where that pays, or where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RowCounts(NamedTuple):
    """How many rows a product runs on: at `least` so many, in multiples of `step`; few `finely`, in finer steps."""

    step: int = 1
    finely: bool = False
    least: int = 1

    def holding(self, n_rows: int) -> int:
        """The smallest such number for so many rows. Fine steps are a quarter of the power of two below, or 1."""
        step, n_rows = self.step, max(n_rows, self.least)
        if self.finely:
            step = min(step, max(1, (1 << max(n_rows - 1, 0).bit_length()) // 8))
        return -(-n_rows // step) * step

    def filled(self, rows: Tensor) -> Tensor:
        """`(R, ...)` with dead rows of zeros after it, up to such a number."""
        n_dead = self.holding(len(rows)) - len(rows)
        return rows if n_dead == 0 else torch.cat((rows, rows.new_zeros(n_dead, *rows.shape[1:])))


SAME_SUMS = RowCounts(least=4)
"""For fewer rows MKL has other kernels, which add up in another order."""


def same_sums(layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The layer's output `(R, O)` for rows `(R, I)`, to the same digits for each however few they are."""
    return layer(SAME_SUMS.filled(rows))[: len(rows)]


def few_outputs(layer: nn.Linear, rows: Tensor) -> Tensor:
    """`layer(rows)` likewise, `(R, I)` -> `(R, O)`, where `O` is so small that a BLAS adds up by the number of rows.

    In float64, so that functions of it can be rounded to the same digits: those of the last numbers of a vector are
    computed otherwise than those of the others.
    """
    return (rows[:, None, :] * layer.weight).sum(-1).double() + layer.bias
