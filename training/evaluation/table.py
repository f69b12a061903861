"""The rows of an evaluation: every method at every mask ratio, on the same masks.

S: segments   P: passes   M: masked tokens   R: mask ratios
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from training.evaluation.causal import Scorer
from training.evaluation.levels import level_readings
from training.evaluation.lookups import (
    Ground,
    Held,
    Rules,
    against_lookups,
    best_depths,
    halting_depths,
    rising_hull,
    unchanged,
)
from training.evaluation.measures import BLEU_ORDER, RUN_LENGTHS, BleuCounter, per_segment, resamples, runs
from training.evaluation.restoring import Evaluation, Measured, Outcome, at_depth
from training.evaluation.results import Comparison, LevelReading, Row
from training.evaluation.rounds import ancestral, mask_predict
from training.evaluation.tallies import Tallies, estimate


@dataclass(frozen=True)
class Plan:
    """What is evaluated; an empty list leaves a method out."""

    mask_ratios: Sequence[float] = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    max_depth: int = 16
    thresholds: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2)
    unchanged: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.2)
    budgets: Sequence[float] = (1.5, 2, 3, 4)
    settle_passes: Sequence[int] = (2, 3, 4, 8, 16)
    """Up to `max_depth`, so that what `settle_thresholds` make has its equal in mean passes."""
    settle_thresholds: Sequence[float] = (0.4, 0.5, 0.6, 0.7)
    mask_predict: Sequence[int] = (2, 4, 10)
    ancestral: Sequence[int] = (4, 10, 32)
    round_depth: int = 1

    def n_rows(self, *, tables: bool) -> int:
        """Of every mask ratio."""
        read_off = self.max_depth + len(self.thresholds) + tables * len(self.budgets) + len(self.unchanged)
        settling = len(self.settle_passes) + len(self.settle_thresholds)
        return read_off + settling + len(self.mask_predict) + 2 * len(self.ancestral)


@dataclass(frozen=True)
class Evaluated:
    rows: list[Row]
    comparisons: list[Comparison]
    tables: dict[float, dict[float, int]] = field(default_factory=dict)  # budget -> mask ratio -> depth
    original_lm_bits: dict[float, float] = field(default_factory=dict)  # what the text itself scores at the masks
    tallies: list[Tallies] = field(default_factory=list)  # of each row
    levels: list[LevelReading] = field(default_factory=list)


class Point(NamedTuple):
    """One setting, and what came of it."""

    kind: str
    setting: float
    outcome: Outcome
    depth: int | None = None  # passes of one round; the depth a table has chosen


class Deep:
    """Every depth of one text at one mask ratio, and the rules whose outcome follows from that."""

    def __init__(self, evaluation: Evaluation, mask_ratio: float, plan: Plan) -> None:
        self.scores, self.levels = evaluation.depths(mask_ratio, plan.max_depth)
        self.plan, self.n_segments = plan, self.levels.shape[1]
        self.config, self.length = evaluation.model.config, evaluation.targets.shape[1]

    def fixed(self, depth: int) -> Outcome:
        return at_depth(self.scores, torch.full((self.n_segments,), depth))

    def gate(self, threshold: float) -> Outcome:
        return at_depth(self.scores, halting_depths(self.levels, threshold))

    def unchanged(self, at_most: float) -> Outcome:
        return unchanged(self.scores, self.n_segments, at_most)

    @property
    def quality(self) -> list[float]:
        """Exact match of every depth."""
        return self.scores.correct.mean(1).tolist()

    def gate_rules(self) -> Rules:
        return self._rules([self.gate(threshold) for threshold in self.plan.thresholds])

    def settle_rules(self, settled: list[Outcome]) -> Rules:
        return self._rules([self.fixed(1), *settled]).by_passes()  # settling in one pass is one pass

    def lookups(self, table_quality: list[float] | None) -> dict[str, Rules]:
        """The free rules; the table's depths are chosen by `table_quality`, exact match on validation text."""
        fixed = self._rules([self.fixed(depth) for depth in range(1, self.plan.max_depth + 1)])
        found = {"fixed": fixed}
        if table_quality is not None:
            found["table"] = fixed.at(rising_hull(table_quality))
        if self.plan.unchanged:  # between the extremes that every rule has: one pass, and all passes
            stops = [self.fixed(1), *map(self.unchanged, self.plan.unchanged), self.fixed(self.plan.max_depth)]
            found["unchanged"] = self._rules(stops).by_passes()
        return found

    def _rules(self, outcomes: list[Outcome]) -> Rules:
        return Rules.of(outcomes, self.config, self.length)


class Judge:
    """Turns the outcome of a method into a row."""

    def __init__(self, evaluation: Evaluation, scorer: Scorer | None) -> None:
        self.evaluation, self.scorer = evaluation, scorer
        self.targets = evaluation.targets.cpu()
        self.n_segments, self.length = self.targets.shape
        self.weights = resamples(self.n_segments, evaluation.seed)
        self.bleu = BleuCounter(evaluation.tokenizer, self.targets)
        self.original_bits = None if scorer is None else scorer.bits(self.targets)  # (S, L)

    def tallies(self, ratio: float, outcome: Outcome) -> Tallies:
        """The tally of each measure. Runs of a length that does not occur are left out, and BLEU of fewer words than it
        counts together.
        """
        scores, masked = outcome.scores, self.evaluation.masked(ratio)
        masks = masked.sum(1).double()
        assert masks.any(), f"nothing is masked at a mask ratio of {ratio}"
        restored = self.restored(masked, scores)
        right = restored == self.targets
        found = {
            "exact_match": torch.stack((self._sums(scores, scores.correct), masks)),
            "bits": torch.stack((self._sums(scores, scores.nats) / math.log(2), masks)),
            "whole": torch.stack((right.all(1).double(), torch.ones(self.n_segments, dtype=torch.float64))),
        }
        if self.length - 2 >= BLEU_ORDER:
            found["bleu"] = self.bleu.of(restored)
        for length in RUN_LENGTHS:
            whole, count = runs(masked, right, length)
            if count.any():
                found[f"run_{length}"] = torch.stack((whole, count))
        if self.scorer is not None and self.original_bits is not None:
            bits = self.scorer.bits(restored)
            found["lm_bits"] = torch.stack(((bits * masked).sum(1), masks))
            found["lm_excess_bits"] = torch.stack(((bits - self.original_bits).sum(1), masks))
        return found

    def row(self, ratio: float, point: Point, tallies: Tallies) -> Row:
        kind, setting, outcome, depth = point
        values: dict[str, float] = {}
        for name, tally in tallies.items():
            found = estimate(tally, self.weights)
            values |= {name: found.value, "interval" if name == "exact_match" else f"{name}_interval": found.interval}
        return Row(
            kind,
            setting,
            ratio,
            passes=outcome.effort.passes.double().mean().item(),
            flops_per_token=self._flops(outcome) / (self.n_segments * self.length),
            depth=depth,
            **values,
        )

    def restored(self, masked: Tensor, scores: Measured) -> Tensor:
        """The text with the guesses in place, `(S, L)`."""
        return self.targets.masked_scatter(masked, scores.guesses)

    def ground(self, ratio: float) -> Ground:
        return Ground(ratio, self.evaluation.masked(ratio).sum(1).double(), self.weights, self.length)

    def original_lm_bits(self, ratio: float) -> float:
        assert self.original_bits is not None
        return self.original_bits[self.evaluation.masked(ratio)].mean().item()

    def _sums(self, scores: Measured, values: Tensor) -> Tensor:
        return per_segment(values, scores.segments, self.n_segments)

    def _flops(self, outcome: Outcome) -> float:
        return outcome.effort.flops(self.evaluation.model.config, self.length).sum().item()


def evaluate(
    evaluation: Evaluation, plan: Plan, validation: Evaluation | None = None, scorer: Scorer | None = None
) -> Evaluated:
    """All rows and comparisons. What is chosen is chosen on `validation`; without it there are no tables."""
    judge = Judge(evaluation, scorer)
    ratios = list(plan.mask_ratios)
    held: dict[float, Deep] = {}
    if validation is not None:
        held = {ratio: Deep(validation, ratio, plan) for ratio in tqdm(ratios, desc="validation", disable=None)}
    tables = choose_tables(held, plan) if held else {}
    found = Evaluated([], [], tables)
    n_rows = len(ratios) * plan.n_rows(tables=bool(tables))
    with tqdm(total=n_rows, desc="evaluation", unit="row", disable=None) as bar:
        for ratio in ratios:
            bar.set_postfix_str(f"mask ratio {ratio:g}")
            deep = Deep(evaluation, ratio, plan)
            outcomes: dict[str, list[Outcome]] = defaultdict(list)
            for point in _points(evaluation, deep, tables, ratio):
                tallies = judge.tallies(ratio, point.outcome)
                found.rows.append(judge.row(ratio, point, tallies))
                found.tallies.append(tallies)
                outcomes[point.kind].append(point.outcome)
                bar.update()
            found.comparisons.extend(_gate_against_lookups(deep, held.get(ratio), judge.ground(ratio)))
            if plan.thresholds:
                found.levels.extend(level_readings(deep.scores, deep.levels, deep.config, ratio))
            settled, sure = outcomes["settle"], outcomes["settle-gate"]
            if settled and sure:
                found.comparisons.extend(_sure_against_pace(deep, sure, settled, judge.ground(ratio)))
            if scorer is not None:
                found.original_lm_bits[ratio] = judge.original_lm_bits(ratio)
    return found


def choose_tables(held: dict[float, Deep], plan: Plan) -> dict[float, dict[float, int]]:
    """For each budget of mean passes, the best depth at each mask ratio on validation text."""
    quality = [deep.quality for deep in held.values()]
    return {budget: dict(zip(held, best_depths(quality, budget), strict=True)) for budget in plan.budgets}


def _points(evaluation: Evaluation, deep: Deep, tables: dict[float, dict[float, int]], ratio: float) -> Iterator[Point]:
    """Every method, in the order of the rows."""
    yield from _read_off(deep, tables, ratio)
    for n_passes in deep.plan.settle_passes:
        yield Point("settle", n_passes, evaluation.settling(ratio, n_passes))
    for threshold in deep.plan.settle_thresholds:
        yield Point("settle-gate", threshold, evaluation.settling(ratio, deep.plan.max_depth, threshold))
    yield from _rounds(evaluation, deep.plan, ratio)


def _read_off(deep: Deep, tables: dict[float, dict[float, int]], ratio: float) -> Iterator[Point]:
    for depth in range(1, deep.plan.max_depth + 1):
        yield Point("fixed", depth, deep.fixed(depth))
    for threshold in deep.plan.thresholds:
        yield Point("gate", threshold, deep.gate(threshold))
    for budget, table in tables.items():
        yield Point("table", budget, deep.fixed(table[ratio]), table[ratio])
    for at_most in deep.plan.unchanged:
        yield Point("unchanged", at_most, deep.unchanged(at_most))


def _rounds(evaluation: Evaluation, plan: Plan, ratio: float) -> Iterator[Point]:
    depth = plan.round_depth
    for n_rounds in plan.mask_predict:
        yield Point("mask-predict", n_rounds, mask_predict(evaluation, ratio, n_rounds, depth), depth)
    for kind, greedy in (("ancestral", False), ("ancestral-greedy", True)):
        for n_steps in plan.ancestral:
            yield Point(kind, n_steps, ancestral(evaluation, ratio, n_steps, depth, greedy=greedy), depth)


def _gate_against_lookups(deep: Deep, held: Deep | None, ground: Ground) -> list[Comparison]:
    thresholds = deep.plan.thresholds
    if not thresholds:
        return []
    quality = None if held is None else held.quality
    on_validation = None if held is None else Held(held.gate_rules(), held.lookups(quality))
    return against_lookups(
        "gate", thresholds, deep.gate_rules(), deep.lookups(quality), ground=ground, held=on_validation
    )


def _sure_against_pace(deep: Deep, sure: list[Outcome], settled: list[Outcome], ground: Ground) -> list[Comparison]:
    rules = Rules.of(sure, deep.config, deep.length)
    lookups = {"settle": deep.settle_rules(settled)}
    return against_lookups("settle-gate", deep.plan.settle_thresholds, rules, lookups, ground=ground)
