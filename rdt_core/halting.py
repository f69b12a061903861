"""When to stop, and which tokens to settle: arithmetic shared by the reference loop and the engine.

Two ways to spend passes. With `gate`, the hidden state is refined until the sequence's level is below the threshold,
then every masked row is decoded once. With `settle`, text comes back gradually: after each pass the rows whose token
level is below the threshold are decoded and become visible to the next pass. At least as many are decoded as keep the
pace to `max_steps`, few at first and ever more, the surest first. Of two neighbours the surer goes first (compare
Luxembourg et al., 2025, "Plan for Speed: Dilated Scheduling for Masked Diffusion Language Models").
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

HaltReason = Literal["gate", "max_steps", "deadline"]
Count = TypeVar("Count", int, Tensor)


def halt_reason(
    *, level: float, threshold: float, step: int, max_steps: int, all_settled: bool, out_of_time: bool
) -> HaltReason | None:
    """Why a sequence stops after `step` passes, or None if it goes on.

    `all_settled` is always false with `gate`: there, nothing is decoded before the end.
    """
    if level < threshold and not all_settled:
        return "gate"
    if step >= max_steps:
        return "max_steps"
    if all_settled:
        return "gate"
    return "deadline" if out_of_time else None


def due(n_masked: Count, step: Count, max_steps: Count) -> Count:
    """How many of `n_masked` rows must be settled after `step` of `max_steps` passes.

    Pass `k` has a share in proportion to `k`, so it is `ceil(n x step (step + 1) / (max (max + 1)))`: what is written
    early is written with the least to go by (compare the cosine schedule of Chang et al., 2022, "MaskGIT: Masked
    Generative Image Transformer", section 3.2). Of one sequence, or as int64 tensors of many.
    """
    return -(-n_masked * step * (step + 1) // (max_steps * (max_steps + 1)))


def which_settle(token_level: Tensor, rows: Tensor, n_due: int, threshold: float) -> Tensor:
    """Of open rows `(M,)` with these token levels `(M,)`, which settle now: `(M,)` bool.

    Those below the threshold, except rows that wait for a surer neighbour. If these are fewer than `n_due`, also the
    surest of the others, and only then rows that wait.
    """
    waits = ~surest_apart(token_level, rows.diff() == 1)
    n_sure = int(((token_level.double() < threshold) & ~waits).sum())
    order = torch.argsort(settling_order(token_level, waits), stable=True)  # ties: the leftmost first
    settles = torch.zeros_like(waits)
    return settles.index_fill(0, order[: max(n_sure, n_due)], True)


def surest_apart(token_level: Tensor, beside: Tensor) -> Tensor:
    """Rows no two of which are neighbours: the surest first, each unless a neighbour has been chosen. `(M,)` bool.

    `beside` `(M - 1,)` bool: row `i + 1` is the neighbour of row `i`. Tokens written in the same pass do not see each
    other, which matters most between neighbours. Ties: the left one first.
    """
    left_wins = token_level[:-1] <= token_level[1:]  # of each pair of rows
    undecided = torch.ones_like(token_level, dtype=torch.bool)
    chosen = torch.zeros_like(undecided)
    while undecided.any():  # usually two rounds, at most half the length of the longest stretch
        rivals = beside & undecided[:-1] & undecided[1:]
        first = undecided.clone()
        first[1:] &= ~(rivals & left_wins)
        first[:-1] &= ~(rivals & ~left_wins)
        chosen |= first
        undecided &= ~first
        undecided[1:] &= ~(beside & first[:-1])
        undecided[:-1] &= ~(beside & first[1:])
    return chosen


def settling_order(token_level: Tensor, waits: Tensor) -> Tensor:
    """Keys `(M,)` to sort rows by: the surest first, and rows that wait after all others."""
    return token_level.double() + waits


def settled_level(left_open: Tensor, n_masked: int, levels: list[float]) -> float:
    """Share of the masked rows that stay open, weighted by their token levels `left_open`; it never rises."""
    if len(left_open) == 0:
        return 0.0
    length = torch.tensor([len(left_open)], device=left_open.device)
    total = torch.segment_reduce(left_open, "sum", lengths=length)  # one after the other, as in the engine
    return min([float(total / n_masked), *levels[-1:]])  # a float32 division, as in the engine
