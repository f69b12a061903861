"""Decoders without recursion: each round runs the model afresh over the text as it stands.

N: segments of a batch   L: tokens of one   T = N x L   R: rounds   K: rows written in a round   V: vocabulary

A round is a prelude, `depth` passes and a decode of the rows it writes. Only the text is carried over to the next
round. Rounds are counted per segment: those in which nothing of it is written do not count. Observed tokens are never
touched.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rdt_core.model import RDT
from rdt_core.packing import Packing
from training.data import stable_seed
from training.evaluation.restoring import Effort, Evaluation, Outcome, Slice, joined

SAMPLING = 1  # a stream of randomness apart from that of the masks


@torch.no_grad()
def mask_predict(evaluation: Evaluation, mask_ratio: float, n_rounds: int, depth: int) -> Outcome:
    """Mask-Predict (Ghazvininejad et al., 2019, section 3), with the observed tokens kept.

    The first round writes all `n` masked tokens; round `t` = 1, 2, ... masks the `n (R - t) / R` (rounded
    down) least confident of them again and writes those anew. A token's confidence is its probability when
    it was last written. Rounds that would mask nothing are left out.
    """
    parts, efforts = [], []
    for batch in evaluation.slices(mask_ratio):
        tokens = batch.tokens.clone()
        nats = torch.zeros_like(tokens, dtype=torch.float64)
        confidence = torch.where(batch.masked, 0.0, math.inf).double()
        n_masked = batch.masked.view(batch.shape).sum(1)  # (N,)
        rounds = _Rounds(batch, depth)
        for number in range(n_rounds):
            again = least(confidence.view(batch.shape), n_masked * (n_rounds - number) // n_rounds).flatten()
            rows = again.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            tokens[rows] = evaluation.tokenizer.mask_id
            logits = forward(evaluation.model, tokens, again, rows, packing=batch.packing, depth=depth)
            best, guess = logits.softmax(-1).max(-1)
            tokens[rows], confidence[rows] = guess, best.double()
            nats[rows] = F.cross_entropy(logits, batch.targets[rows], reduction="none").double()
            rounds.count(again)
        parts.append(batch.measured(tokens[batch.rows], nats[batch.rows]))
        efforts.append(rounds.effort())
    return Outcome(joined(parts), joined(efforts))


def least(values: Tensor, counts: Tensor) -> Tensor:
    """The `counts` `(N,)` lowest of each row of values `(N, L)`, the leftmost of equals first: `(N, L)` bool."""
    places = values.argsort(dim=1, stable=True).argsort(dim=1)
    return places < counts[:, None]


@torch.no_grad()
def ancestral(evaluation: Evaluation, mask_ratio: float, n_steps: int, depth: int, *, greedy: bool = False) -> Outcome:
    """Ancestral sampling of masked diffusion (MDLM, Sahoo et al., 2024; LLaDA, Nie et al., 2025).

    The mask ratio falls from `t_0` to 0 on an even grid of `n_steps`; from `t` to `s` each token still
    masked is revealed with probability `(t - s) / t`, independently, and drawn from the model's
    distribution at temperature 1 (`greedy`: its mode). What is revealed stays. A step that reveals
    nothing of a segment leaves its text as it was and needs no forward, so it is not counted.
    """
    parts, efforts = [], []
    for batch in evaluation.slices(mask_ratio):
        tokens, still_masked = batch.tokens.clone(), batch.masked.clone()
        nats = torch.zeros_like(tokens, dtype=torch.float64)
        n_segments, length = batch.shape
        seeds = [stable_seed(evaluation.seed, SAMPLING, batch.first + i) for i in range(n_segments)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rounds = _Rounds(batch, depth)
        for step in range(n_steps):
            draws = torch.stack([torch.rand(2, length, generator=generator) for generator in generators], dim=1)
            when, what = draws.flatten(1).to(tokens.device)  # (T,) each
            revealed = still_masked & (when < reveal_probability(step, n_steps))
            rows = revealed.nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            logits = forward(evaluation.model, tokens, still_masked, rows, packing=batch.packing, depth=depth)
            tokens[rows] = logits.argmax(-1) if greedy else drawn(logits, what[rows])
            nats[rows] = F.cross_entropy(logits, batch.targets[rows], reduction="none").double()
            still_masked &= ~revealed
            rounds.count(revealed)
        parts.append(batch.measured(tokens[batch.rows], nats[batch.rows]))
        efforts.append(rounds.effort())
    return Outcome(joined(parts), joined(efforts))


def reveal_probability(step: int, n_steps: int) -> float:
    """`(t - s) / t` from `t = t_0 (1 - step / n)` to `s = t_0 (1 - (step + 1) / n)`: `1 / (n - step)`, 1 at the end."""
    return 1.0 / (n_steps - step)


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, by the inverse of the cumulative distribution: logits `(K, V)`, uniform `(K,)` in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    at = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def forward(model: RDT, tokens: Tensor, masked: Tensor, rows: Tensor, *, packing: Packing, depth: int) -> Tensor:
    """`depth` passes from scratch: tokens `(T,)`, masked `(T,)` bool, rows `(K,)` -> float32 logits `(K, V)`."""
    state = model.begin(tokens, masked, packing)
    for _ in range(depth):
        state = model(state, packing)
    return model.decode(state.hidden, packing, rows).float()


class _Rounds:
    """Counts the rounds each segment of a batch takes part in."""

    def __init__(self, batch: Slice, depth: int) -> None:
        self.shape, self.depth = batch.shape, depth
        self.rounds = torch.zeros(batch.shape[0], dtype=torch.int64)
        self.rows = torch.zeros_like(self.rounds)

    def count(self, written: Tensor) -> None:
        rows = written.view(self.shape).sum(1).cpu()
        self.rounds += rows > 0
        self.rows += rows

    def effort(self) -> Effort:
        return Effort(self.rounds, self.rounds * self.depth, self.rounds, self.rows, torch.zeros_like(self.rows))
