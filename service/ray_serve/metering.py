"""The metrics of all replicas, whichever of them is asked.

Behind Serve's proxy a scrape reaches any one replica. So every few seconds each replica puts what it has measured on
a common board, an actor of Ray's. The one that is asked shows what it finds there: every series of every replica, with
the label `replica`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import ray

from service.engine.scheduler import SchedulerLimits
from service.engine.types import Outcome, Plan
from service.metrics import Metrics

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
STALE_SECONDS = 5 * REPORT_SECONDS
"""A replica that has not reported for this long is gone."""
ASK_SECONDS = 1.0
"""How long a scrape waits for the board; without an answer, the replica shows only its own metrics."""
NAMESPACE = "rdt"
DECAY = 0.99
"""How much less each tick counts than the next of its size, for how long they take."""


class Board:
    """The last report of each replica. A Ray actor that ends with the replica which made it; the next report then makes
    another.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, str]] = {}

    def put(self, replica: str, report: str) -> None:
        self._reports[replica] = (self._clock(), report)

    def drop(self, replica: str) -> None:
        self._reports.pop(replica, None)

    def reports(self) -> dict[str, str]:
        oldest = self._clock() - STALE_SECONDS
        self._reports = {replica: kept for replica, kept in self._reports.items() if kept[0] >= oldest}
        return {replica: report for replica, (_, report) in self._reports.items()}


class BoardClient(Protocol):
    """The board as replicas reach it."""

    async def put(self, replica: str, report: str) -> None: ...

    async def drop(self, replica: str) -> None: ...

    async def reports(self) -> dict[str, str]: ...


class RayBoard:
    """Finds the board by its name, or makes it; does so again when it is gone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    async def put(self, replica: str, report: str) -> None:
        await self._ask(lambda actor: actor.put.remote(replica, report))

    async def drop(self, replica: str) -> None:
        await self._ask(lambda actor: actor.drop.remote(replica))

    async def reports(self) -> dict[str, str]:
        found: dict[str, str] = await self._ask(lambda actor: actor.reports.remote())
        return found

    async def _ask(self, question: Callable[[Any], Awaitable[Any]]) -> Any:
        if self._actor is None:
            self._actor = await asyncio.to_thread(self._find)
        try:
            return await question(self._actor)
        except ray.exceptions.RayActorError:
            self._actor = None
            raise

    def _find(self) -> Any:
        kind = ray.remote(Board).options(name=self._name, namespace=NAMESPACE, get_if_exists=True, num_cpus=0)
        return kind.remote()


class Load:
    """What was computed, as the seconds that full ticks would have taken for it.

    The time that ticks take would say more than there is: with few texts they are small, and cost more a token. How
    full they are would say less: they fill up only when there is nearly too much.
    """

    def __init__(self) -> None:
        self._token_budget = self._max_live = 1
        self._seen: dict[int, tuple[float, float]] = {}  # order of magnitude -> seconds and amount of its ticks
        self._seconds = 0.0  # since it was asked last, as is the next
        self._amount = 0

    def describe_bounds(self, bounds: SchedulerLimits) -> None:
        self._token_budget, self._max_live = bounds.token_budget, bounds.max_live

    def ticked(self, seconds: float, plan: Plan) -> None:
        amount = max(plan.n_tokens, len(plan.live) * self._token_budget // self._max_live)
        order = amount.bit_length()
        before, so_far = self._seen.get(order, (0.0, 0.0))
        self._seen[order] = DECAY * before + seconds, DECAY * so_far + amount
        self._seconds += seconds
        self._amount += amount

    def take(self) -> float:
        """Seconds of full ticks since the last call, at most what the ticks took. Until full ones have been seen, the
        fullest stand for them, which is too much.
        """
        seconds, amount = self._seen[max(self._seen)] if self._seen else (0.0, 1.0)
        worked = min(self._seconds, self._amount * seconds / amount)
        self._seconds, self._amount = 0.0, 0
        return worked


class ReplicaMetrics(Metrics):
    """A replica's own metrics, shown together with the others'."""

    def __init__(self, clock: Callable[[], float], replica: str, board: BoardClient) -> None:
        super().__init__(clock)
        self._replica = replica
        self._board = board
        self._load = Load()
        self._load_asked = clock()

    def describe_bounds(self, bounds: SchedulerLimits, replicas: int) -> None:
        super().describe_bounds(bounds, replicas)
        self._load.describe_bounds(bounds)

    def ticked(self, seconds: float, plan: Plan, outcome: Outcome) -> None:
        super().ticked(seconds, plan, outcome)
        self._load.ticked(seconds, plan)

    def load(self, n_batches: int) -> float:
        """The load of `n_batches` since the last call: 0 idle, 1 all that they can do."""
        now = self._clock()
        passed, self._load_asked = now - self._load_asked, now
        worked = self._load.take()
        return min(1.0, worked / (passed * n_batches)) if passed > 0 else 0.0

    async def scrape(self) -> bytes:
        """Of all replicas: this one now, the others as they have reported; without an answer in time, only this one."""
        try:
            reports = await asyncio.wait_for(self._board.reports(), ASK_SECONDS)
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("the metrics of other replicas cannot be had: %s", error)
            reports = {}
        return merge({**reports, self._replica: self.exposition().decode()}).encode()

    async def report_forever(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._board.put(self._replica, self.exposition().decode()), STALE_SECONDS)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.debug("the metrics could not be reported: %s", error)
            await asyncio.sleep(REPORT_SECONDS)

    async def leave(self) -> None:
        """Remove this replica's report, so that the next scrape does not show it."""
        with suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(self._board.drop(self._replica), ASK_SECONDS)


def merge(reports: Mapping[str, str]) -> str:
    """One exposition of many: each family once, with the samples of every replica."""
    families: dict[str, list[str]] = {}  # by their lines HELP and TYPE
    for replica, report in sorted(reports.items()):
        head = ""
        for line in report.splitlines():
            if line.startswith("# HELP "):
                head = line
            elif line.startswith("#"):
                head = f"{head}\n{line}"
                families.setdefault(head, [])
            elif line:
                families[head].append(labelled(line, replica))
    return "".join("\n".join([head, *samples, ""]) for head, samples in families.items())


def labelled(sample: str, replica: str) -> str:
    """`name{a="b"} 1` with the replica as its first label."""
    name_end = min(at for at in (sample.find("{"), sample.find(" ")) if at >= 0)
    name, rest = sample[:name_end], sample[name_end:]
    label = f'replica="{replica}"'
    return f"{name}{{{label},{rest[1:]}" if rest.startswith("{") else f"{name}{{{label}}}{rest}"
