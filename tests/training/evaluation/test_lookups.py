from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rdt_core import ModelConfig, flops
from training.evaluation.lookups import (
    Ground,
    Held,
    Rules,
    against_lookups,
    best_depths,
    halting_depths,
    passes_needed,
    rising_hull,
    unchanged,
    unchanged_depths,
)
from training.evaluation.measures import resamples
from training.evaluation.restoring import Measured, at_depth
from training.evaluation.results import Comparison

CONFIG = ModelConfig(vocab_size=50, d_model=16, n_heads=2, n_encoder_layers=2, d_ff=32)


def measured(guesses: list[list[int]], segments: list[int]) -> Measured:
    """Guesses of every depth; a guess of 1 is right."""
    found = torch.tensor(guesses)
    return Measured((found == 1).double(), torch.zeros(found.shape), torch.tensor(segments), found)


def rules(hits: list[list[float]], passes: list[list[float]]) -> Rules:
    return Rules(torch.tensor(hits).double(), torch.tensor(passes).double(), 100 * torch.tensor(passes).double())


def test_a_sequence_halts_at_the_first_pass_below_the_threshold() -> None:
    levels = torch.tensor([[0.9, 0.04, 0.5], [0.3, 0.03, 0.5], [0.04, 0.02, 0.5]])
    assert halting_depths(levels, 0.05).tolist() == [3, 1, 3]


def test_unchanged_stops_at_the_first_pass_that_repeats_the_last() -> None:
    """Segment 0 repeats at pass 3 of 4; segment 1 changes every time; segment 2 has nothing masked."""
    scores = measured([[7, 7, 1], [1, 7, 2], [1, 7, 3], [2, 7, 4]], segments=[0, 0, 1])
    assert unchanged_depths(scores, 3).tolist() == [3, 4, 2]
    assert unchanged_depths(scores, 3, at_most=0.5).tolist() == [2, 4, 2]
    assert unchanged_depths(measured([[7]], [0]), 1).tolist() == [1]


def test_unchanged_pays_for_a_decode_of_every_masked_row_after_every_pass() -> None:
    scores = measured([[7, 7, 1], [1, 7, 2], [1, 7, 3], [2, 7, 4]], segments=[0, 0, 1])
    effort = unchanged(scores, 2, 0.0).effort
    assert effort.passes.tolist() == [3, 4]
    assert effort.rows.tolist() == [2 * 3, 1 * 4]
    plain = at_depth(scores, torch.tensor([3, 4])).effort
    extra = effort.flops(CONFIG, 10) - plain.flops(CONFIG, 10)
    assert extra.tolist() == [4 * flops.decode_flops(CONFIG), 3 * flops.decode_flops(CONFIG)]


def test_a_segment_with_nothing_masked_takes_its_passes_and_decodes_nothing() -> None:
    effort = at_depth(measured([[7, 1], [1, 1]], segments=[0, 0]), torch.tensor([1, 2, 2])).effort
    assert (effort.passes.tolist(), effort.rows.tolist()) == ([1, 2, 2], [2, 0, 0])


def test_a_lottery_has_the_passes_asked_for_and_the_mean_of_its_neighbours() -> None:
    fixed = rules([[1, 1], [2, 4], [2, 2]], [[1, 1], [2, 2], [4, 4]])
    mixed = fixed.lottery(3.0)
    assert mixed.passes.tolist() == [[3, 3]]
    assert mixed.hits.tolist() == [[2, 3]]
    assert fixed.lottery(2.0).hits.tolist() == [[2, 4]]
    assert fixed.lottery(0.5).hits.tolist() == [[1, 1]]
    assert fixed.lottery(9.0).passes.tolist() == [[4, 4]]


def test_rules_are_put_in_the_order_of_their_passes() -> None:
    unsorted = rules([[3], [1], [2]], [[3], [1], [2]])
    assert unsorted.by_passes().hits.tolist() == [[1], [2], [3]]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_the_hull_is_the_best_that_mixing_depths_can_do(quality: list[int]) -> None:
    """Against every mixture of two depths, at every whole and half budget."""
    corners = rising_hull(quality)
    hull = rules([[float(quality[i])] for i in corners], [[i + 1.0] for i in corners])
    depths = range(1, len(quality) + 1)
    for budget in (half / 2 for half in range(2, 2 * len(quality) + 1)):
        best = -math.inf
        for low, high in product(depths, depths):
            if low <= budget < high:
                odds = (budget - low) / (high - low)
                best = max(best, (1 - odds) * quality[low - 1] + odds * quality[high - 1])
            if low <= budget:
                best = max(best, quality[low - 1])
        assert hull.lottery(budget).hits.item() == pytest.approx(best)


@given(
    st.integers(1, 3).flatmap(
        lambda n_depths: st.lists(
            st.lists(st.integers(0, 9), min_size=n_depths, max_size=n_depths), min_size=1, max_size=4
        )
    ),
    st.sampled_from([1, 1.25, 1.5, 2, 2.5, 3]),
)
def test_the_table_is_the_best_within_its_budget(quality: list[list[int]], budget: float) -> None:
    found = best_depths(quality, budget)
    n_passes = int(budget * len(quality))
    assert sum(found) <= n_passes

    def value(table: tuple[int, ...]) -> int:
        return sum(depths[depth - 1] for depths, depth in zip(quality, table, strict=True))

    affordable = [
        table for table in product(range(1, len(quality[0]) + 1), repeat=len(quality)) if sum(table) <= n_passes
    ]
    best = max(map(value, affordable))
    assert value(tuple(found)) == best
    assert sum(found) == min(sum(table) for table in affordable if value(table) == best)


def test_a_budget_of_less_than_a_pass_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"budget is 0\.5"):
        best_depths([[1.0]], 0.5)


def test_passes_needed_are_where_the_quality_is_first_reached() -> None:
    lookup = rules([[2, 2], [4, 4], [3, 3]], [[1, 1], [2, 2], [5, 5]])
    ones, masks = torch.ones(4, 2).double(), torch.tensor([10.0, 10.0]).double()
    needed, reached = passes_needed(lookup, torch.tensor([0.1, 0.3, 0.4, 0.41], dtype=torch.float64), masks, ones)
    assert needed.tolist() == pytest.approx([1.0, 1.5, 2.0, 5.0])
    assert reached.tolist() == [True, True, True, False]


def compare(own: Rules, lookups: dict[str, Rules], masks: Tensor, held: Held | None = None) -> list[Comparison]:
    ground = Ground(0.5, masks, resamples(len(masks), seed=0, n=200), length=10)
    return against_lookups("gate", list(range(len(own.hits))), own, lookups, ground=ground, held=held)


def test_a_rule_against_itself_differs_by_nothing_and_saves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 4, (6, 30), generator=generator).double().cumsum(0)  # hits that rise with depth
    fixed = Rules(steps, torch.arange(1.0, 7.0).double()[:, None].expand(6, 30), steps)
    masks = torch.full((30,), 8.0).double()
    for depth, one in enumerate(compare(fixed, {"fixed": fixed}, masks), start=1):
        assert (one.difference, one.interval) == (0.0, 0.0)
        assert one.best
        assert abs(one.difference) <= one.interval
        assert one.saved == pytest.approx(0.0)
        assert (one.passes, one.against_passes) == (depth, depth)
        assert (one.saved_low, one.saved_high, one.unreached) == pytest.approx((0.0, 0.0, 0.0))


def test_a_gate_that_knows_which_segments_are_hard_beats_every_lookup() -> None:
    """Half of the segments gain only by a second pass, half only lose by it."""
    hard = torch.arange(40) % 2
    one_pass, two_passes = 4 - hard, 3 + hard
    fixed = Rules(torch.stack((one_pass, two_passes)).double(), torch.tensor([[1.0], [2.0]]).expand(2, 40).double(),
                  torch.full((2, 40), 3.0).double())  # fmt: skip
    oracle = Rules(torch.full((1, 40), 4.0).double(), 1 + hard[None].double(), torch.ones(1, 40).double())
    (found,) = compare(oracle, {"fixed": fixed}, torch.full((40,), 5.0).double())
    assert found.passes == found.against_passes == 1.5
    assert (found.exact_match, found.against_exact_match) == pytest.approx((4 / 5, 3.5 / 5))
    assert (found.flops_per_token, found.against_flops_per_token) == pytest.approx((0.1, 0.3))
    assert found.difference == pytest.approx(0.5 / 5)
    assert found.difference > found.interval
    assert found.unreached == 1.0
    assert found.saved == pytest.approx(0.5)  # at least: two passes are never as good


def test_what_is_saved_lies_within_its_interval_in_19_of_20_resamples() -> None:
    """A lookup whose every pass restores one token more needs as many passes as the rule restores tokens."""
    hits, passes = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 2
    fixed = rules([[float(depth)] * 30 for depth in range(1, 6)], [[float(depth)] * 30 for depth in range(1, 6)])
    own = Rules(hits[None], passes[None], passes[None])
    (found,) = compare(own, {"fixed": fixed}, torch.full((30,), 10.0).double())
    drawn = resamples(30, seed=0, n=200) @ (hits - passes) / 30
    assert found.saved == pytest.approx((hits - passes).mean().item())
    assert ((drawn < found.saved_low).sum(), (drawn > found.saved_high).sum()) == (5, 5)
    assert found.unreached == 0


def test_the_best_lookup_is_the_one_that_is_best_on_validation_text() -> None:
    masks = torch.full((4,), 5.0).double()
    good, bad = ([[3.0] * 4, [4.0] * 4], [[1.0] * 4, [1.0] * 4])
    passes = [[1.0] * 4, [2.0] * 4]
    gate = rules([[3.0] * 4], [[1.5] * 4])
    here = {"fixed": rules(good, passes), "unchanged": rules(bad, passes)}
    there = {"fixed": rules(bad, passes), "unchanged": rules(good, passes)}
    found = compare(gate, here, masks, Held(gate, there))
    assert {one.against: one.best for one in found} == {"fixed": False, "unchanged": True}
    assert not any(one.best for one in compare(gate, here, masks))
