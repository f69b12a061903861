"""The reference: one sequence at a time, one pass after another, without optimisations.

Every faster way of running the model is compared with this loop: same tokens, same steps.

L: tokens of the sequence   M: its masked rows   V: vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rdt_core.config import Halting
from rdt_core.decoding import read_logits
from rdt_core.halting import HaltReason, due, halt_reason, settled_level, which_settle
from rdt_core.model import RDT, State
from rdt_core.packing import Packing


@dataclass(frozen=True)
class Restoration:
    """One sequence restored. Rows are the masked ones (all with `decode_all`), in order of position."""

    tokens: list[int]  # (L,) the input with the restored tokens in place
    rows: list[int]  # (M,) which positions were decoded
    probabilities: list[float]  # (M,) of each chosen token
    fixed_at: list[int]  # (M,) the pass after which each token was chosen
    candidates: list[list[tuple[int, float]]]  # (M, top_k) (token, probability), most likely first
    steps: int
    levels: list[float]  # (steps,) the level after each pass
    reason: HaltReason


Observer = Callable[[int, float, State], None]


class Choice(NamedTuple):
    """What was written in a row, and after which pass."""

    token: int
    probability: float
    step: int
    candidates: list[tuple[int, float]]


@torch.no_grad()
def restore(
    model: RDT,
    tokens: Tensor,
    masked: Tensor,
    *,
    max_steps: int | None = None,
    threshold: float | None = None,
    halting: Halting | None = None,
    top_k: int = 0,
    decode_all: bool = False,
    observe: Observer | None = None,
    out_of_time: Callable[[], bool] | None = None,
) -> Restoration:
    """Apply the encoder until the sequence halts. tokens `(L,)` int64 or int32, masked `(L,)` bool.

    Options default to the model's own. `observe(step, level, state)` is called after every pass.
    `decode_all` decodes every row at the end, not only the masked ones. Once `out_of_time()` is true, the
    sequence stops and is decoded as it stands. Raises `ValueError` for tokens or masks of another shape or type, a
    sequence longer than `max_seq_len`, an option out of range, or a model in training mode that drops out.
    """
    asked = {"max_steps": max_steps, "threshold": threshold, "halting": halting}
    config = model.config.with_changes(**{name: value for name, value in asked.items() if value is not None})
    max_steps, threshold, halting = config.max_steps, config.threshold, config.halting
    _check_text(model, tokens, masked)
    if type(top_k) is not int or not 0 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k is {top_k!r}: want a whole number, 0 to vocab_size = {config.vocab_size}")

    packing = Packing.of([len(tokens)], model.device)
    state = model.begin(tokens.to(model.device), masked.to(model.device), packing)
    n_masked = int(masked.sum())
    chosen: dict[int, Choice] = {}
    levels: list[float] = []
    reason: HaltReason | None = None

    while reason is None:
        state = model(state, packing)
        step = len(levels) + 1
        rows = open_rows = state.masked.nonzero().squeeze(1)  # (M,)
        if halting == "settle":
            token_level = model.token_level(state.hidden, packing, open_rows)
            settles = which_settle(token_level, open_rows, due(n_masked, step, max_steps) - len(chosen), threshold)
            rows, level = open_rows[settles], settled_level(token_level[~settles], n_masked, levels)
        else:
            level = float(state.gate.level[0])
        levels.append(level)

        reason = halt_reason(
            level=level,
            threshold=threshold,
            step=step,
            max_steps=max_steps,
            all_settled=halting == "settle" and len(chosen) + len(rows) == n_masked,
            out_of_time=out_of_time is not None and out_of_time(),
        )
        if reason is not None:
            rows = open_rows
        if halting == "settle" or reason is not None:
            chosen |= _decode(model, state, packing, rows, step=step, top_k=top_k)
            state = model.settle(state, rows, torch.tensor([chosen[row].token for row in rows.tolist()]).to(rows))
        if observe is not None:
            observe(step, level, state)

    if decode_all:
        rest = torch.tensor([row for row in range(len(tokens)) if row not in chosen], device=model.device)
        chosen |= _decode(model, state, packing, rest, step=len(levels), top_k=top_k)
    return _assemble(tokens, chosen, levels, reason)


def _decode(model: RDT, state: State, packing: Packing, rows: Tensor, *, step: int, top_k: int) -> dict[int, Choice]:
    if len(rows) == 0:
        return {}
    read = read_logits(model.decode(state.hidden, packing, rows), top_k)
    candidates = [
        list(zip(ids, shares, strict=True))
        for ids, shares in zip(read.top_tokens.tolist(), read.top_probabilities.tolist(), strict=True)
    ]
    found = zip(rows.tolist(), read.tokens.tolist(), read.probabilities.tolist(), candidates, strict=True)
    return {row: Choice(token, probability, step, others) for row, token, probability, others in found}


def _assemble(tokens: Tensor, chosen: dict[int, Choice], levels: list[float], reason: HaltReason) -> Restoration:
    restored = tokens.tolist()
    rows = sorted(chosen)
    for row in rows:
        restored[row] = chosen[row].token
    choices = [chosen[row] for row in rows]
    return Restoration(
        tokens=restored,
        rows=rows,
        probabilities=[choice.probability for choice in choices],
        fixed_at=[choice.step for choice in choices],
        candidates=[choice.candidates for choice in choices],
        steps=len(levels),
        levels=levels,
        reason=reason,
    )


def _check_text(model: RDT, tokens: Tensor, masked: Tensor) -> None:
    config = model.config
    if tokens.ndim != 1 or tokens.dtype not in (torch.int64, torch.int32):  # an embedding takes no others
        raise ValueError(f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}: want int64 or int32 of shape (L,)")
    if model.training and config.dropout > 0:
        raise ValueError("the model is in training mode and drops out: call eval() on it first")
    if not 1 <= len(tokens) <= config.max_seq_len:
        raise ValueError(f"tokens has length {len(tokens)}: want 1 to max_seq_len = {config.max_seq_len}")
    if masked.dtype != torch.bool or masked.shape != tokens.shape:
        raise ValueError(
            f"masked is {masked.dtype} of shape {tuple(masked.shape)}: want bool of shape ({len(tokens)},)"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"tokens has {low if low < 0 else high}: want 0 <= token < vocab_size = {config.vocab_size}")
