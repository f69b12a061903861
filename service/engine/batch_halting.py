"""`rdt_core.halting` for a whole batch, on the device: which rows settle, what level is left, and who stops, and why.

The arithmetic is that of the reference, for all sequences at once. Nothing is read back from the device.

T: packed tokens   N: live sequences
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdt_core.halting import due, settling_order
from rdt_core.packing import Packing, sequence_sum
from service.engine.types import HaltReason

REASONS: tuple[HaltReason | None, ...] = (None, "gate", "max_steps", "deadline")
GO_ON, GATE, MAX_STEPS, DEADLINE = range(4)


class Terms(NamedTuple):
    """The options of each live sequence, and how far it is. All `(N,)`."""

    threshold: Tensor  # float64, so that comparisons are those of the reference
    ceiling: Tensor  # passes it may make
    step: Tensor  # passes it has made
    level: Tensor  # after the last pass
    n_masked: Tensor
    settles: Tensor  # bool
    decode_all: Tensor  # bool
    streams: Tensor  # bool


def settling_rows(candidates: Tensor, token_level: Tensor, waits: Tensor, packing: Packing, terms: Terms) -> Tensor:
    """Which rows settle now, `(T,)` bool: `rdt_core.halting.which_settle` for each sequence.

    `candidates` `(T,)` bool are the open rows of sequences that settle; `waits` `(T,)` bool are those with a surer
    neighbour.
    """
    ids = packing.sequence_ids
    n_open = count(candidates, packing)  # (N,)
    n_due = due(terms.n_masked, terms.step, terms.ceiling) - (terms.n_masked - n_open)
    n_sure = count(candidates & ~waits & (token_level < terms.threshold[ids]), packing)
    n_taken = torch.maximum(n_due, n_sure)  # (N,)
    in_order = torch.argsort(settling_order(token_level, waits), stable=True)
    groups = 2 * ids + ~candidates  # each sequence's candidates, in the order they settle, then its other rows
    by_sequence = in_order[torch.argsort(groups[in_order], stable=True)]
    rank = torch.empty_like(ids).scatter_(0, by_sequence, packing.positions)  # (T,) place among its own
    return candidates & (rank < n_taken[ids])


def settled_level(left_open: Tensor, packing: Packing, terms: Terms) -> Tensor:
    """Share of masked rows still open, weighted by token level `(T,)`, 0 for all others; never rising `(N,)`."""
    return torch.minimum(sequence_sum(left_open, packing) / terms.n_masked.clamp(min=1), terms.level)


def reasons_of(
    level: Tensor, threshold: Tensor, last: Tensor, late: Tensor, all_settled: Tensor | None = None
) -> Tensor:
    """`rdt_core.halting.halt_reason` for all sequences at once: codes `(N,)`, indices into `REASONS`."""
    below = level < threshold
    code = torch.where(late, DEADLINE, GO_ON)
    if all_settled is not None:
        below &= ~all_settled
        code = torch.where(all_settled, GATE, code)
    code = torch.where(last, MAX_STEPS, code)
    return torch.where(below, GATE, code)


def count(rows: Tensor, packing: Packing) -> Tensor:
    """How many of the marked rows `(T,)` bool lie in each sequence `(N,)`."""
    zero = torch.zeros(packing.n_sequences, dtype=torch.int64, device=rows.device)
    return zero.index_add_(0, packing.sequence_ids, rows.long())
