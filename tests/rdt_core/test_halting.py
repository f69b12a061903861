from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.halting import due, halt_reason, settled_level, surest_apart, which_settle


@given(st.integers(0, 600), st.integers(1, 40))
def test_the_share_of_a_pass_grows_with_its_number_and_the_last_one_settles_the_rest(
    n_masked: int, max_steps: int
) -> None:
    pace = [due(n_masked, step, max_steps) for step in range(max_steps + 1)]
    total = sum(range(max_steps + 1))
    assert pace == [math.ceil(Fraction(n_masked * sum(range(step + 1)), total)) for step in range(max_steps + 1)]
    assert (pace[0], pace[-1]) == (0, n_masked)
    steps = torch.arange(max_steps + 1)
    assert due(torch.tensor(n_masked), steps, torch.tensor(max_steps)).tolist() == pace


@pytest.mark.parametrize(
    ("level", "step", "all_settled", "out_of_time", "reason"),
    [
        (0.4, 1, False, False, "gate"),
        (0.4, 8, False, False, "gate"),
        (0.5, 1, False, False, None),
        (0.5, 8, False, False, "max_steps"),
        (0.5, 1, False, True, "deadline"),
        (0.4, 1, False, True, "gate"),
        (0.5, 8, False, True, "max_steps"),
        (0.0, 3, True, False, "gate"),
        (0.5, 3, True, True, "gate"),
        (0.0, 8, True, False, "max_steps"),
    ],
)
def test_why_a_sequence_stops(
    level: float, step: int, all_settled: bool, out_of_time: bool, reason: str | None
) -> None:
    assert reason == halt_reason(
        level=level, threshold=0.5, step=step, max_steps=8, all_settled=all_settled, out_of_time=out_of_time
    )


@pytest.mark.parametrize(
    ("n_due", "threshold", "rows"),
    [
        (0, 0.2, [2, 6]),
        (1, 0.2, [2, 6]),
        (3, 0.2, [2, 4, 6]),
        (1, 0.0, [2]),
        (-2, 0.0, []),
        (0, 0.1, []),
        (0, 0.5, [2, 6]),
        (0, 0.7, [2, 4, 6, 8]),  # in float32, 0.7 is less than in float64, which thresholds are in
        (9, 0.0, [0, 2, 4, 6, 8]),
    ],
)
def test_sure_rows_settle_and_the_surest_others_keep_the_pace(n_due: int, threshold: float, rows: list[int]) -> None:
    apart = torch.tensor([0, 2, 4, 6, 8])
    token_level = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.7])
    assert apart[which_settle(token_level, apart, n_due, threshold)].tolist() == rows


@pytest.mark.parametrize(
    ("n_due", "threshold", "rows"),
    [
        (1, 0.0, [1]),
        (2, 0.0, [1, 3]),
        (3, 0.0, [1, 3, 7]),  # surer than 7, but beside a surer one: 2 and 4
        (4, 0.0, [1, 2, 3, 7]),  # and when nobody else is left, the surest of those that wait
        (0, 0.35, [1, 3]),
        (0, 1.0, [1, 3, 7]),
        (6, 1.0, [0, 1, 2, 3, 4, 7]),
    ],
)
def test_of_neighbours_the_surer_settles_first(n_due: int, threshold: float, rows: list[int]) -> None:
    places = torch.tensor([0, 1, 2, 3, 4, 7])
    token_level = torch.tensor([0.8, 0.1, 0.3, 0.2, 0.4, 0.9])
    assert places[which_settle(token_level, places, n_due, threshold)].tolist() == rows


def test_of_rows_that_wait_the_surest_settles_first_however_sure_all_are() -> None:
    token_level, places = torch.tensor([0.0, 2e-9, 0.0, 1e-9]), torch.tensor([1, 2, 5, 6])
    assert which_settle(token_level, places, 3, 0.0).tolist() == [True, False, True, True]


def test_of_neighbours_as_sure_as_each_other_the_left_one_settles_first() -> None:
    places = torch.arange(4)
    assert which_settle(torch.full((4,), 0.5), places, 0, 1.0).tolist() == [True, False, True, False]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), st.booleans()), max_size=24))
def test_the_surest_apart_are_those_of_one_choice_after_the_other(rows: list[tuple[float, bool]]) -> None:
    levels, beside = [level for level, _ in rows], [joined for _, joined in rows[1:]]
    chosen: set[int] = set()
    for row in sorted(range(len(rows)), key=lambda row: levels[row]):
        left, right = row > 0 and beside[row - 1], row < len(rows) - 1 and beside[row]
        if not (left and row - 1 in chosen) and not (right and row + 1 in chosen):
            chosen.add(row)
    found = surest_apart(torch.tensor(levels), torch.tensor(beside, dtype=torch.bool))
    assert found.tolist() == [row in chosen for row in range(len(rows))]


def test_choosing_among_levels_that_are_no_numbers_ends() -> None:
    assert surest_apart(torch.full((5,), math.nan), torch.ones(4, dtype=torch.bool)).any()


@pytest.mark.parametrize("n_rows", [0, 1])
def test_no_row_and_one_row_have_no_neighbours(n_rows: int) -> None:
    places = torch.arange(n_rows)
    assert which_settle(torch.full((n_rows,), 0.5), places, 1, 0.0).tolist() == [True] * n_rows


def test_the_level_of_a_settling_sequence_is_what_stays_open() -> None:
    left_open = torch.tensor([0.9, 0.5, 0.7])
    assert settled_level(left_open, 5, []) == pytest.approx((0.9 + 0.5 + 0.7) / 5)
    assert settled_level(left_open, 5, [1.0, 0.3]) == 0.3
    assert settled_level(left_open[:0], 0, []) == 0.0
