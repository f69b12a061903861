"""Sequences laid end to end without padding.

    tokens of three sequences, 3 + 2 + 4 long:

    packed        [a a a b b c c c c]      (T,)   T = 9
    offsets       [0 3 5 9]                (N+1,) N = 3
    positions     [0 1 2 0 1 0 1 2 3]      (T,)   place inside the own sequence
    sequence_ids  [0 0 0 1 1 2 2 2 2]      (T,)   which sequence a row belongs to

Attention, positions, the gate and what levels scale look at the `Packing`. All else works row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of `N` sequences lies among `T` packed rows."""

    lengths: tuple[int, ...]
    offsets: Tensor  # (N+1,) int32
    positions: Tensor  # (T,) int64
    sequence_ids: Tensor  # (T,) int64

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Packing:
        """Lay out sequences of the given lengths (each >= 1, else `ValueError`)."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths is {tuple(lengths)!r}: want at least one sequence, each of length >= 1")
        lengths = tuple(int(length) for length in lengths)
        return cls(lengths, *laid_out(to_device(torch.tensor(lengths), device), sum(lengths)))

    @property
    def n_sequences(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        return int(self.positions.shape[0])

    @property
    def equal_lengths(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def longest(self) -> int:
        return max(self.lengths)


def laid_out(lengths: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets `(N+1,)` int32, positions `(T,)` and sequence ids `(T,)` of lengths `(N,)` int64, 0 or more.

    `n_tokens` is their sum, which the caller knows: reading it off the device would wait for it.
    """
    offsets = F.pad(lengths.cumsum(0), (1, 0))  # (N+1,)
    sequence_ids = torch.repeat_interleave(lengths, output_size=n_tokens)
    positions = torch.arange(n_tokens, device=lengths.device) - offsets[sequence_ids]
    return offsets.to(torch.int32), positions, sequence_ids


def to_device(values: Tensor, device: torch.device | str | None) -> Tensor:
    """From the host to a device; to CUDA through pinned memory, so as not to wait for the work queued there."""
    if device is None or torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """`N` tensors `(L_i, ...)` -> one tensor `(T, ...)` and its layout."""
    packing = Packing.of([len(sequence) for sequence in sequences], sequences[0].device if sequences else None)
    return torch.cat(list(sequences)), packing


def unpack(packed: Tensor, packing: Packing) -> list[Tensor]:
    """`(T, ...)` -> `N` views `(L_i, ...)`."""
    return list(packed.split(packing.lengths))


def rows_of(packing: Packing, sequences: Sequence[int]) -> Tensor:
    """Packed row numbers `(T',)` of the given sequences, in the given order."""
    offsets = [0, *accumulate(packing.lengths)]  # reading those on the device would wait for it
    rows = [torch.arange(offsets[i], offsets[i + 1]) for i in sequences]
    return to_device(torch.cat(rows), packing.positions.device)


def sequence_sum(rows: Tensor, packing: Packing) -> Tensor:
    """Sum of the rows of each sequence: rows `(T, ...)` of a floating type -> `(N, ...)`.

    The order of summation does not depend on the other sequences. (With `index_add_` on `sequence_ids` it does not even
    stay the same from run to run on CUDA.)
    """
    # "unsafe" leaves out checks that would wait for the device
    return torch.segment_reduce(rows, "sum", offsets=packing.offsets, axis=0, unsafe=True)
