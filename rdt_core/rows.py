"""How many rows a matrix product runs on: rows of zeros ("dead" rows) are added for speed, or so that results are the
same to the last digit however few rows there are. (On a CPU those of one thread: how several share a product depends on
its rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RowCounts(NamedTuple):
    """The numbers of rows that a product may run on: multiples of `step`, and not below `least`. With `finely`, a
    small number is a multiple of a quarter of the power of two below it instead, or of 1.
    """

    step: int = 1
    finely: bool = False
    least: int = 1

    def holding(self, n_rows: int) -> int:
        """The smallest allowed number that is at least `n_rows`."""
        step, n_rows = self.step, max(n_rows, self.least)
        if self.finely:
            step = min(step, max(1, (1 << n_rows.bit_length()) // 8))
        return -(-n_rows // step) * step

    def filled(self, rows: Tensor) -> Tensor:
        """`(R, ...)` with rows of zeros after it, up to an allowed number."""
        n_dead = self.holding(len(rows)) - len(rows)
        return rows if n_dead == 0 else torch.cat((rows, rows.new_zeros(n_dead, *rows.shape[1:])))


SAME_SUMS = RowCounts(least=4)
"""With fewer than 4 rows MKL uses other kernels, which add up in another order."""


def same_sums(layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`layer(rows)`, `(R, I)` -> `(R, O)`: each row's digits are the same, however few rows there are.

    For a dozen outputs or more: with fewer, the order in which MKL adds up may depend on their number (`few_outputs`).
    """
    return layer(SAME_SUMS.filled(rows))[: len(rows)]


def few_outputs(layer: nn.Linear, rows: Tensor) -> Tensor:
    """The same for an `O` so small that the order in which a BLAS adds up always depends on the number of rows.

    The result is in float64. Elementwise functions of it, rounded to float32, then have the same digits too: vectorised
    code computes the last numbers of a vector in another way than the others.
    """
    return (rows[:, None, :] * layer.weight).sum(-1).double() + layer.bias
