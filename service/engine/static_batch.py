"""A batch of fixed size in fixed slots, so that a pass over it can be captured once and replayed.

T: rows of the bucket   N: its slots   D: model width   G: features of the gate

Sequences lie end to end at the front, as in any packing. The rows behind them are unused and belong to the last
slot, which no sequence has. A slot whose reason is not `GO_ON` is frozen: passes leave it and its rows untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rdt_core.gate import GateState
from rdt_core.model import RDT, State
from rdt_core.packing import Packing, laid_out, to_device
from service.engine.batch_halting import GATE, GO_ON, reasons_of

SMALLEST_BUCKET = 64
ROWS_A_SEQUENCE = 8
"""A bucket of T rows has T / 8 slots, so of shorter sequences it takes fewer than its rows could hold. It has no more
slots than may be live: attention is launched for each, taken or not."""


class Size(NamedTuple):
    """Of a bucket."""

    n_rows: int
    n_slots: int


def sizes_up_to(token_budget: int, max_live: int) -> list[Size]:
    """64, 96, 128, 192, 256, … rows up to the budget. From 43 rows on, at most a third of a bucket's are dead."""
    steps = [SMALLEST_BUCKET]
    while steps[-1] < token_budget:
        steps += [steps[-1] * 3 // 2, steps[-1] * 2]
    rows = [n_rows for n_rows in steps if n_rows < token_budget]
    sizes = [Size(n_rows, min(n_rows // ROWS_A_SEQUENCE, max_live) + 1) for n_rows in rows]
    return [*sizes, Size(token_budget, max_live + 1)]


@dataclass(frozen=True, eq=False)
class Bucket(Packing):
    """A packing of fixed size: dead rows belong to the last sequence, which is nobody's."""

    n_rows: int
    n_slots: int
    longest_live: int  # tokens; attention is launched for so many of every sequence, and the dead rows are none

    @property
    def n_sequences(self) -> int:
        return self.n_slots

    @property
    def equal_lengths(self) -> bool:
        return False

    @property
    def longest(self) -> int:
        return self.longest_live


class Buffers(NamedTuple):
    """What a pass reads and writes in place: capacity `T` and `N`, of which a bucket uses the first part."""

    hidden: Tensor  # (T, D)
    embedded: Tensor  # (T, D)
    masked: Tensor  # (T,) bool
    positions: Tensor  # (T,) int64
    sequence_ids: Tensor  # (T,) int64
    offsets: Tensor  # (N + 1,) int32
    level: Tensor  # (N,)
    summary: Tensor  # (N, G)
    threshold: Tensor  # (N,) float64
    ceiling: Tensor  # (N,) int64
    step: Tensor  # (N,) int64
    late: Tensor  # (N,) bool
    reason: Tensor  # (N,) int64, an index into `REASONS`; anything but `GO_ON` is frozen

    @classmethod
    def of(cls, model: RDT, n_rows: int, n_slots: int) -> Buffers:
        config, device = model.config, model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        width = config.d_model
        return cls(
            hidden=zeros(n_rows, width),
            embedded=zeros(n_rows, width),
            masked=zeros(n_rows, dtype=torch.bool),
            positions=zeros(n_rows, dtype=torch.int64),
            sequence_ids=zeros(n_rows, dtype=torch.int64),
            offsets=zeros(n_slots + 1, dtype=torch.int32),
            level=zeros(n_slots),
            summary=zeros(n_slots, config.gate_hidden_dim),
            threshold=zeros(n_slots, dtype=torch.float64),
            ceiling=zeros(n_slots, dtype=torch.int64),
            step=zeros(n_slots, dtype=torch.int64),
            late=zeros(n_slots, dtype=torch.bool),
            reason=zeros(n_slots, dtype=torch.int64),
        )

    def bucket(self, size: Size, lengths: tuple[int, ...], longest_live: int) -> Bucket:
        """The first rows and slots, with whatever layout is written there."""
        rows = slice(size.n_rows)
        offsets = self.offsets[: size.n_slots + 1]
        return Bucket(lengths, offsets, self.positions[rows], self.sequence_ids[rows], *size, longest_live)


ROW_BUFFERS = ("hidden", "embedded", "masked")
SLOT_BUFFERS = ("level", "summary", "threshold", "ceiling", "step", "reason")
"""What moves with a sequence when the batch closes up."""


class Passes(Protocol):
    """Carries out `one_pass`."""

    def prepare(self, buffers: Buffers, sizes: Sequence[Size]) -> None:
        """Before the first request: make what can be made ahead."""

    def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
        """One pass over the bucket's rows and slots, in place."""


def one_pass(model: RDT, buffers: Buffers, bucket: Bucket) -> None:
    """The arithmetic of a tick: nothing here asks the device about a value, so that it can be captured."""
    rows, slots = slice(bucket.n_rows), slice(bucket.n_slots)
    gate = GateState(buffers.level[slots], buffers.summary[slots])
    before = State(buffers.hidden[rows], buffers.embedded[rows], buffers.masked[rows], gate)
    after = model(before, bucket)
    goes_on = buffers.reason[slots] == GO_ON  # (N,)
    row_goes_on = goes_on[bucket.sequence_ids]  # (T,)
    torch.where(row_goes_on[:, None], after.hidden.float(), before.hidden, out=before.hidden)
    buffers.summary[slots] = torch.where(goes_on[:, None], after.gate.summary, gate.summary)
    buffers.level[slots] = torch.where(goes_on, after.gate.level, gate.level)
    buffers.step[slots] += goes_on
    reason = reasons_of(
        level=buffers.level[slots],
        threshold=buffers.threshold[slots],
        last=buffers.step[slots] >= buffers.ceiling[slots],
        late=buffers.late[slots],
    )
    buffers.reason[slots] = torch.where(goes_on, reason, buffers.reason[slots])


class PlainPasses:
    """Each operation as it comes."""

    def __init__(self, model: RDT) -> None:
        self._model = model

    def prepare(self, buffers: Buffers, sizes: Sequence[Size]) -> None:
        pass

    def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
        one_pass(self._model, buffers, bucket)


def lay_out(buffers: Buffers, lengths: Sequence[int], size: Size) -> Bucket:
    """Write where sequences of these lengths lie, one behind the other, and freeze the slots behind them."""
    n_live, n_tokens = len(lengths), sum(lengths)
    n_dead = size.n_rows - n_tokens
    by_slot = np.zeros(size.n_slots, np.int64)
    by_slot[:n_live], by_slot[-1] = lengths, n_dead
    on_device = to_device(torch.from_numpy(by_slot), buffers.hidden.device)
    offsets, positions, sequence_ids = laid_out(on_device, size.n_rows)
    rows = slice(size.n_rows)
    buffers.positions[rows], buffers.sequence_ids[rows] = positions, sequence_ids
    buffers.offsets[: size.n_slots + 1] = offsets.clamp(max=n_tokens)  # to attention the dead rows are no sequence
    buffers.masked[n_tokens : size.n_rows] = False
    buffers.reason[n_live : size.n_slots] = GATE
    return buffers.bucket(size, (*lengths, n_dead) if n_dead else tuple(lengths), max(lengths))


def close_up(buffers: Buffers, kept: Sequence[tuple[int, range]]) -> None:
    """Move kept slots, each with its rows, to the front in this order."""
    whence = np.array([[at for at, _ in kept], [rows.start for _, rows in kept], [len(rows) for _, rows in kept]])
    slots, starts, lengths = to_device(torch.from_numpy(whence), buffers.hidden.device)
    _, positions, sequences = laid_out(lengths, int(whence[2].sum()))
    rows = starts[sequences] + positions
    for names, chosen in ((ROW_BUFFERS, rows), (SLOT_BUFFERS, slots)):
        for name in names:
            buffer: Tensor = getattr(buffers, name)
            buffer[: len(chosen)] = buffer[chosen]  # gathered first, then written
