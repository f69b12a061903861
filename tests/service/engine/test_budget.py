"""What a shortage of memory costs, and for how long."""

from __future__ import annotations

import pytest

from service.engine.budget import GROWING_SECONDS, TickBudget


@pytest.fixture
def budget() -> TickBudget:
    """A tick of 16 tokens has been computed, 32 are allowed."""
    budget = TickBudget(32)
    budget.worked(16)
    budget.warmed(alone=True)
    return budget


def test_a_tick_larger_than_any_before_halves_the_budget_for_good(budget: TickBudget) -> None:
    budget.shrink(17, now=0.0)
    assert budget.tokens == 8
    budget.grow(GROWING_SECONDS)
    assert budget.tokens == 8


def test_a_tick_larger_than_the_budget_takes_half_of_the_budget(budget: TickBudget) -> None:
    """As one that was on its way when the budget shrank."""
    budget.shrink(40, now=0.0)
    assert budget.tokens == 16


def test_the_first_shortage_of_a_tick_that_worked_before_costs_nothing(budget: TickBudget) -> None:
    assert not budget.short
    budget.shrink(16, now=0.0)
    assert (budget.tokens, budget.short) == (32, True)
    budget.worked(4)
    assert not budget.short
    budget.shrink(16, now=1.0)
    assert budget.tokens == 32, "a tick in between was computed, so it is the first again"


def test_the_second_in_a_row_halves_the_budget_until_a_while_has_passed(budget: TickBudget) -> None:
    for now in (0.0, 1.0):
        budget.shrink(16, now)
    assert budget.tokens == 16
    budget.grow(GROWING_SECONDS)
    assert budget.tokens == 16, "a second too early"
    budget.grow(1.0 + GROWING_SECONDS)
    assert budget.tokens == 32


def test_a_shortage_with_something_that_found_none_before_is_no_first(budget: TickBudget) -> None:
    budget.shrink(16, now=0.0, again=True)
    assert budget.tokens == 16


def test_growing_takes_a_while_for_each_doubling_and_ends_at_what_was_allowed() -> None:
    budget = TickBudget(30)
    budget.worked(30)
    for _ in range(4):
        budget.shrink(8, now=0.0)
    grown = []
    for now in (60.0, 61.0, 120.0, 180.0, 240.0):
        budget.grow(now)
        grown.append(budget.tokens)
    assert grown == [6, 6, 12, 24, 30]


def test_what_was_too_much_while_warming_is_tried_again_unless_nobody_else_held_memory() -> None:
    for alone, tokens in ((True, 16), (False, 32)):
        budget = TickBudget(32)
        assert not budget.short
        budget.shrink(32, now=0.0)
        budget.warmed(alone)
        budget.grow(GROWING_SECONDS)
        assert budget.tokens == tokens
