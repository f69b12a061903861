"""What simulations are asked for: the token budget, the bounds of the queue, the number of replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

from benchmarks.fleet import Routing, saturate, simulate
from benchmarks.fleet_report import Report
from benchmarks.tick_cost import UNBOUNDED, TickCost
from benchmarks.traffic import Arrival, draw, steady
from service.engine.scheduler import SchedulerLimits

TOKEN_BUDGETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SHORTEST = 8
"""Tokens of a workload's shortest request: a budget divided by it is the most that can be live."""
GOOD_ENOUGH = 0.97
NEAR_LOAD, OVERLOAD = 0.8, 2.0
IN_TIME, MOST_REPLICAS = 0.99, 4096
REQUESTS = 4000


@dataclass(frozen=True)
class BudgetTrial:
    """One token budget: saturated, at `NEAR_LOAD` of its own throughput, and at the same rate as all budgets."""

    token_budget: int
    throughput: float  # a second, saturated
    tick_ms: float  # of a saturated tick: how long a cancellation or a deadline may have to wait
    p99_ms: float  # at NEAR_LOAD of this throughput
    p99_alike_ms: float  # at NEAR_LOAD of the smallest budget's throughput

    @property
    def max_live(self) -> int:
        return bounded_by(self.token_budget).max_live


def try_budgets(cost: TickCost, workload: str) -> list[BudgetTrial]:
    """All budgets that can hold the workload's longest request."""
    longest = max(len(arrival.job.tokens) for arrival in draw(workload, repeat(0.0, REQUESTS)))
    budgets = [budget for budget in TOKEN_BUDGETS if budget >= longest]
    full = {budget: saturated(cost, workload, budget) for budget in budgets}
    alike = NEAR_LOAD * full[budgets[0]].throughput
    return [
        BudgetTrial(
            budget,
            throughput=full[budget].throughput,
            tick_ms=full[budget].mean_tick_ms,
            p99_ms=p99_ms(cost, workload, budget, NEAR_LOAD * full[budget].throughput),
            p99_alike_ms=p99_ms(cost, workload, budget, alike),
        )
        for budget in budgets
    ]


def saturated(cost: TickCost, workload: str, token_budget: int) -> Report:
    limits = bounded_by(token_budget)
    return saturate(draw(workload, repeat(0.0, REQUESTS)), limits.max_live, cost, limits)


def p99_ms(cost: TickCost, workload: str, token_budget: int, rate: float) -> float:
    report = simulate(draw(workload, steady(rate, REQUESTS / rate)), cost, bounded_by(token_budget))
    return report.latency_ms["p99"]


def bounded_by(token_budget: int) -> SchedulerLimits:
    """Nothing but the budget limits."""
    return SchedulerLimits(token_budget, token_budget // SHORTEST, UNBOUNDED, UNBOUNDED)


def choose_budget(trials: Sequence[BudgetTrial]) -> BudgetTrial:
    """The smallest that is good enough: what a larger one adds in throughput is not worth its longer ticks."""
    best = max(trial.throughput for trial in trials)
    return min((t for t in trials if t.throughput >= GOOD_ENOUGH * best), key=lambda trial: trial.token_budget)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the queue, and the queueing they lead to under OVERLOAD."""

    max_waiting: int
    max_waiting_tokens: int
    queue_p50_seconds: float
    queue_max_seconds: float


def choose_bounds(cost: TickCost, workload: str, trial: BudgetTrial, patience: float) -> Bounds:
    """A queue as long as what is served within `patience` seconds, so that no accepted request waits longer."""
    mean_tokens = sum(len(arrival.job.tokens) for arrival in draw(workload, repeat(0.0, REQUESTS))) / REQUESTS
    max_waiting = max(1, math.floor(trial.throughput * patience))
    max_waiting_tokens = math.ceil(max_waiting * mean_tokens)
    limits = SchedulerLimits(trial.token_budget, trial.max_live, max_waiting, max_waiting_tokens)
    rate = OVERLOAD * trial.throughput
    full = simulate(draw(workload, steady(rate, max(REQUESTS / rate, 10 * patience))), cost, limits)
    return Bounds(max_waiting, max_waiting_tokens, full.queue_ms["p50"] / 1e3, full.queue_ms["max"] / 1e3)


def plan_fleet(
    arrivals: Callable[[], Iterable[Arrival]], p99: float, cost: TickCost, limits: SchedulerLimits, routing: Routing
) -> tuple[int, Report]:
    """The fewest replicas that answer 99 of 100 requests within `p99` seconds; a refused one is not answered.

    `arrivals` gives the same traffic every time. Raises `ValueError` when no number of replicas will do.
    """
    reports: dict[int, Report] = {}

    def serves(replicas: int) -> bool:
        reports[replicas] = simulate(arrivals(), cost, limits, replicas, routing)
        return reports[replicas].share_within(p99) >= IN_TIME

    replicas = fewest(serves)
    return replicas, reports[replicas]


def fewest(serves: Callable[[int], bool]) -> int:
    """Found by doubling and bisection. Raises `ValueError` when even MOST_REPLICAS do not serve."""
    too_few, enough = 0, 1
    while not serves(enough):
        too_few, enough = enough, 2 * enough
        if enough > MOST_REPLICAS:
            raise ValueError(f"{too_few} replicas are not enough: want more time for a request, or fewer requests")
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if serves(middle) else (middle, enough)
    return enough
