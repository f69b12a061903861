"""Rules that halt without a gate, and the gate against them at equal passes.

S: segments   M: masked tokens   P: passes   K: settings of one rule, from few passes to many   B: resamples

Free lookups: a fixed depth; a table that knows the mask ratio, its depths chosen on validation text; and stopping
once the best guesses no longer change, which must decode after every pass.

Two rules seldom make the same number of passes, so they are compared by lottery: each segment runs under one of two
neighbouring settings, with odds that give the mean passes wanted. The expected score is a weighted mean of two known
scores, so the lottery adds no noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rdt_core.config import ModelConfig
from training.evaluation.measures import central, paired_difference, per_segment
from training.evaluation.restoring import Measured, Outcome, at_depth
from training.evaluation.results import Comparison


def halting_depths(levels: Tensor, threshold: float) -> Tensor:
    """levels `(P, S)` -> the pass `(S,)` after which each sequence halts, 1 to P."""
    below = levels < threshold
    first = below.int().argmax(0) + 1
    return torch.where(below.any(0), first, len(levels))


def unchanged_depths(scores: Measured, n_segments: int, at_most: float = 0.0) -> Tensor:
    """The first pass, from the second on, whose best guesses differ from the last in a share `at_most`: `(S,)`."""
    n_passes = len(scores.guesses)
    if n_passes == 1:
        return torch.ones(n_segments, dtype=torch.int64)
    masks = torch.bincount(scores.segments, minlength=n_segments)
    changes = per_segment(scores.guesses[1:] != scores.guesses[:-1], scores.segments, n_segments)  # (P - 1, S)
    still = changes <= at_most * masks
    return torch.where(still.any(0), still.int().argmax(0) + 2, n_passes)


def unchanged(scores: Measured, n_segments: int, at_most: float) -> Outcome:
    """Stop once the guesses no longer change; this decodes every masked row in every pass."""
    steps = unchanged_depths(scores, n_segments, at_most)
    outcome = at_depth(scores, steps)
    effort = outcome.effort
    return outcome._replace(effort=effort._replace(decodes=steps, rows=effort.rows * steps))


class Rules(NamedTuple):
    """One rule at one mask ratio under `K` settings. All `(K, S)`."""

    hits: Tensor
    passes: Tensor
    flops: Tensor

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], config: ModelConfig, length: int) -> Rules:
        n_segments = len(outcomes[0].effort.passes)
        hits = [per_segment(o.scores.correct, o.scores.segments, n_segments) for o in outcomes]
        return cls(
            torch.stack(hits),
            torch.stack([o.effort.passes for o in outcomes]).double(),
            torch.stack([o.effort.flops(config, length) for o in outcomes]),
        )

    def at(self, settings: Tensor | list[int]) -> Rules:
        return Rules(self.hits[settings], self.passes[settings], self.flops[settings])

    def by_passes(self) -> Rules:
        """Settings with fewer passes first: what a lottery is drawn from."""
        return self.at(self.passes.mean(1).argsort(stable=True))

    def lottery(self, mean_passes: float) -> Rules:
        """The expected scores `(1, S)` of the lottery with these mean passes, or of the nearest setting.

        The settings must be in the order of `by_passes`.
        """
        means = self.passes.mean(1)
        upper = int((means < mean_passes).sum())
        if upper in (0, len(means)):
            return self.at([min(upper, len(means) - 1)])
        odds = (mean_passes - means[upper - 1]) / (means[upper] - means[upper - 1])
        return Rules(*(((1 - odds) * values[upper - 1] + odds * values[upper])[None] for values in self))


def rising_hull(quality: Sequence[float]) -> list[int]:
    """Indices of the depths worth mixing: the corners of the rising, concave hull of quality over passes."""
    corners = [0]
    while corners[-1] < len(quality) - 1:
        last = corners[-1]
        slopes = [(quality[i] - quality[last]) / (i - last) for i in range(last + 1, len(quality))]
        if max(slopes) <= 0:
            break
        corners.append(last + 1 + slopes.index(max(slopes)))
    return corners


def best_depths(quality: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One depth a mask ratio, of the best summed quality with at most `budget` passes in the mean.

    quality `(R, P)`, of every depth at every mask ratio; of equally good tables the one with the fewest passes.
    """
    n_passes = int(budget * len(quality) + 1e-9)
    tables: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # passes spent -> the best way to spend them
    for depths in quality:
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (value, table) in sorted(tables.items()):
            for depth, gain in enumerate(depths, start=1):
                total = spent + depth
                if total <= n_passes and (total not in longer or value + gain > longer[total][0]):
                    longer[total] = (value + gain, [*table, depth])
        tables = longer
    if not tables:
        raise ValueError(f"budget is {budget}: want at least one pass for each mask ratio")
    return max(sorted(tables.items()), key=lambda item: item[1][0])[1][1]


def passes_needed(rules: Rules, wanted: Tensor, masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean passes at which a lottery first is as good as `wanted` `(B,)`, and whether it ever is; both `(B,)`.

    Where it never is, the largest mean passes. Rules must be in the order of `by_passes`; weights `(B, S)` says how
    often each segment counts.
    """
    quality = (weights @ rules.hits.T) / (weights @ masks)[:, None]  # (B, K)
    passes = (weights @ rules.passes.T) / weights.sum(1, keepdim=True)  # (B, K)
    good = quality >= wanted[:, None]
    upper = good.int().argmax(1, keepdim=True)  # (B, 1)
    lower = (upper - 1).clamp(min=0)
    (q0, q1), (p0, p1) = ([v.gather(1, at).squeeze(1) for at in (lower, upper)] for v in (quality, passes))
    rise = torch.where(q1 > q0, q1 - q0, 1.0)
    crossing = torch.where(upper.squeeze(1) == 0, p1, p0 + (p1 - p0) * (wanted - q0) / rise)
    reached = good.any(1)
    return torch.where(reached, crossing, passes[:, -1]), reached


class Held(NamedTuple):
    """The same rules on validation (held-out) text."""

    rules: Rules
    lookups: Mapping[str, Rules]

    def best_against(self, index: int) -> str:
        """Name of the lookup that restores most at as many mean passes as the rule makes under this setting."""
        passes = self.rules.passes[index].mean().item()
        return max(self.lookups, key=lambda name: self.lookups[name].lottery(passes).hits.sum().item())


class Ground(NamedTuple):
    """What rules are compared on: the same masks of the same segments."""

    mask_ratio: float
    masks: Tensor  # (S,) how many masked tokens each segment has
    weights: Tensor  # (B, S) resamples
    length: int  # tokens of a segment


def against_lookups(
    kind: str,
    settings: Sequence[float],
    rules: Rules,
    lookups: Mapping[str, Rules],
    *,
    ground: Ground,
    held: Held | None = None,
) -> list[Comparison]:
    """Every setting of the rules of this kind against every lookup.

    Without validation text no lookup is called the best, unless there is only one.
    """
    found = []
    for index, setting in enumerate(settings):
        best = next(iter(lookups)) if len(lookups) == 1 else None
        if held is not None:
            best = held.best_against(index)
        for name, lookup in lookups.items():
            compared = _compare(rules.at([index]), lookup, ground)
            found.append(Comparison(kind=kind, setting=setting, against=name, best=name == best, **compared))
    return found


def _compare(own: Rules, lookup: Rules, ground: Ground) -> dict[str, float]:
    """One setting `(1, S)` against a lookup, at equal passes and at equal quality: the figures of a `Comparison`."""
    masks, once = ground.masks, torch.ones(1, len(ground.masks), dtype=torch.float64)
    other = lookup.lottery(own.passes.mean().item())
    difference = paired_difference(own.hits[0], other.hits[0], masks)
    saved, reached = _saved(own, lookup, masks, ground.weights)
    low, high = central(saved)
    return {
        "mask_ratio": ground.mask_ratio,
        "passes": own.passes.mean().item(),
        "against_passes": other.passes.mean().item(),
        "exact_match": (own.hits.sum() / masks.sum()).item(),
        "against_exact_match": (other.hits.sum() / masks.sum()).item(),
        "difference": difference.value,
        "interval": difference.interval,
        "flops_per_token": own.flops.mean().item() / ground.length,
        "against_flops_per_token": other.flops.mean().item() / ground.length,
        "saved": _saved(own, lookup, masks, once)[0].item(),
        "saved_low": low,
        "saved_high": high,
        "unreached": 1 - reached.double().mean().item(),
    }


def _saved(own: Rules, lookup: Rules, masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Passes by which a lookup as good as `own` would be dearer `(B,)`, and whether one ever is as good `(B,)` bool."""
    quality = (weights @ own.hits[0]) / (weights @ masks)  # (B,)
    needed, reached = passes_needed(lookup, quality, masks, weights)
    return needed - (weights @ own.passes[0]) / weights.sum(1), reached
