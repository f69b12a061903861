"""Replicas under a simulated clock: the server's own scheduler, a formula for its backend, and a router.

A replica's clock advances from tick to tick, and only up to the arrival of its next request. Depths are known
beforehand: every request makes its `max_steps` passes, or fewer when the scheduler sheds.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import Literal

from benchmarks.fleet_report import Books, Report, report
from benchmarks.tick_cost import TickCost
from benchmarks.traffic import Arrival
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Outcome, Plan, Reading, Ticket
from service.errors import ResourceExhausted

Routing = Literal["turns", "two", "least"]
ROUTINGS: tuple[Routing, ...] = ("turns", "two", "least")

GOES_ON = Reading(level=1.0, reason=None, chosen=[], guesses=[])
STOPS = Reading(level=1.0, reason="max_steps", chosen=[], guesses=[])


class Replica:
    """One server: its scheduler, and the tick under way if there is one."""

    def __init__(self, limits: SchedulerLimits, cost: TickCost) -> None:
        self.books = Books()
        self._scheduler = Scheduler(limits)
        self._cost = cost
        self._plan: Plan | None = None  # None: nothing to do
        self._ends = 0.0  # when the tick under way is over
        self._leaving: dict[int, list[Ticket]] = defaultdict(list)  # number of a tick -> whose last it is
        self._n_masked: dict[Ticket, int] = {}  # of every request inside

    @property
    def n_inside(self) -> int:
        """Requests waiting or live."""
        return len(self._n_masked)

    @property
    def resting(self) -> bool:
        return self._plan is None

    def run(self, until: float = math.inf) -> None:
        """End the ticks that are over by then, each followed by the next."""
        while self._plan is not None and self._ends <= until:
            self.end_tick()

    def offer(self, arrival: Arrival) -> None:
        """Queue or refuse a request. Requests come in order of arrival."""
        self.run(until=arrival.time)
        try:
            with self._scheduler.queue.reserve() as place:
                ticket = self._scheduler.queue.join(arrival.job, place, arrival.time)
        except ResourceExhausted:
            self.books.n_refused += 1
            return
        self._n_masked[ticket] = arrival.n_masked
        if self._plan is None:
            self._begin_tick(arrival.time)

    def end_tick(self) -> float:
        """End the tick under way, which must exist, and begin the next. Returns the time."""
        plan, now, books = self._plan, self._ends, self.books
        assert plan is not None
        leavers = self._leaving.pop(books.n_ticks, ())
        readings = {ticket: STOPS if ticket in leavers else GOES_ON for ticket in plan.live}
        for ticket, result in self._scheduler.commit(plan, Outcome(readings, n_decoded=0), now):
            del self._n_masked[ticket]
            books.latencies.append(result.queue_seconds + result.compute_seconds + self._cost.outside)
            books.queueing.append(result.queue_seconds)
        self._begin_tick(now)
        return now

    def _begin_tick(self, now: float) -> None:
        plan, books = self._scheduler.plan(now), self.books
        if plan.empty:
            self._plan = None
            return
        self._plan = plan
        for admission in plan.admitted:
            self._leaving[books.n_ticks + admission.ceiling].append(admission.ticket)
            books.steps_shed += admission.job.max_steps - admission.ceiling
        books.n_ticks += 1
        books.n_tokens += plan.n_tokens
        n_rows = sum(self._n_masked[ticket] for ticket in self._leaving.get(books.n_ticks, ()))
        seconds = self._cost.seconds(plan.n_tokens, n_rows, len(plan.admitted))
        books.busy_seconds += seconds
        books.seconds = self._ends = now + seconds


def candidates(routing: Routing, fleet: Sequence[Replica], seed: int = 0) -> Iterator[Sequence[Replica]]:
    """The replicas that the router chooses between, for each request in turn.

    `turns`: one after the other. `two`: two at random. `least`: all of them, which takes a while for many.
    """
    if routing == "turns":
        yield from cycle((replica,) for replica in fleet)
    rng, n = random.Random(seed), len(fleet) if routing == "least" else min(2, len(fleet))
    while True:
        yield rng.sample(fleet, n)


def simulate(
    arrivals: Iterable[Arrival], cost: TickCost, limits: SchedulerLimits, replicas: int = 1, routing: Routing = "turns"
) -> Report:
    """Open loop: everything that arrives, each to the candidate with the fewest inside, until the last answer."""
    fleet = [Replica(limits, cost) for _ in range(replicas)]
    for arrival, choice in zip(arrivals, candidates(routing, fleet), strict=False):
        if len(choice) > 1:
            for replica in choice:
                replica.run(until=arrival.time)
        min(choice, key=lambda replica: replica.n_inside).offer(arrival)
    for replica in fleet:
        replica.run()
    return report([replica.books for replica in fleet])


def saturate(arrivals: Iterable[Arrival], concurrency: int, cost: TickCost, limits: SchedulerLimits) -> Report:
    """Closed loop on one replica: `concurrency` requests at a time, the next one when one is answered."""
    replica, left = Replica(limits, cost), iter(arrivals)
    for arrival in islice(left, concurrency):
        replica.offer(arrival._replace(time=0.0))
    while not replica.resting:
        now = replica.end_tick()
        for arrival in islice(left, concurrency - replica.n_inside):
            replica.offer(arrival._replace(time=now))
    return report([replica.books])
