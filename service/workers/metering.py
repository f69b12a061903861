"""The metrics of several processes as those of one server, whichever worker is asked.

Counters and histograms are sums over the engine and all workers, present and past. Gauges are the engine's, except
for the memory of processes, which is a sum too, their open files: those of the process that has most, because each has
a limit of its own, and readiness, for which a worker has to be ready, too. A counter that was shown never shrinks as
long as a worker remembers it, because Prometheus would take that for a restart and compute false rates.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from service.errors import Unavailable
from service.metrics import Metrics
from service.workers.messages import Base, Hello, Report, ReportWanted, Samples, Scrape, Scraped
from service.workers.remote import Link
from service.workers.wire import Wire

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
"""How often a worker reports; a killed one loses what it counted since its last report."""
ANSWER_SECONDS = 0.5
"""How long a scrape waits for the workers' reports; for a late worker, its last report counts."""
SCRAPE_SECONDS = 2.0
COUNTERS = ("counter", "histogram")
MAX_DEPARTED = 64
"""How many departed workers have counters of their own; those of older ones are added up."""
SUMMED_GAUGES = ("process_resident_memory_bytes", "process_virtual_memory_bytes")
LARGEST_GAUGES = ("process_open_fds",)
READY = "rdt_ready"


class WorkerMetrics(Metrics):
    """A worker's own metrics; a scrape shows the whole server's."""

    def __init__(self, clock: Callable[[], float], link: Link) -> None:
        super().__init__(clock)
        self._link = link
        self._asked = 0

    def report(self, asked: int | None = None) -> Report:
        if asked is not None:  # a new engine counts from the start
            self._asked = asked
        families = list(self.registry.collect())
        return Report(self._asked, _samples(families, _counts), _samples(families, _is_everybodys))

    async def report_forever(self) -> None:
        while True:
            self._link.send(self.report())
            await asyncio.sleep(REPORT_SECONDS)

    async def scrape(self) -> bytes:
        """Raises `Unavailable` without an engine: a failed scrape is better than one of half the server."""
        try:
            answer = await asyncio.wait_for(self._link.ask(Scrape, Scraped), SCRAPE_SECONDS)
        except TimeoutError:
            raise Unavailable("the engine's process does not answer", "failed") from None
        return answer.exposition


class Ledger:
    """In the engine's process: the reports of all workers, and their sum. `n_workers` is how many there should be."""

    def __init__(self, metrics: Metrics, n_workers: int = 0) -> None:
        self._metrics = metrics
        self._n_workers = n_workers
        self._id = uuid.uuid4().hex
        self._reports: dict[str, Report] = {}  # by worker
        self._departed: dict[str, Samples] = {}  # by worker: one that only lost its connection comes back
        self._inherited: Samples = {}
        self.asked = 0
        """The number of the last round of reports."""
        self._booked = asyncio.Event()

    def book(self, worker: str, report: Report) -> None:
        self._reports[worker] = report
        self._departed.pop(worker, None)
        self._booked.set()

    def depart(self, worker: str, lost: bool) -> None:
        """A worker has gone; what it has counted stays in the sum."""
        if lost:
            self._metrics.workers_lost.inc()
        report = self._reports.pop(worker, None)
        if report is not None:
            self._departed[worker] = report.counters
        while len(self._departed) > MAX_DEPARTED:
            long_gone = self._departed.pop(next(iter(self._departed)))
            self._inherited = _sum([self._inherited, long_gone])
        self._booked.set()

    def inherit(self, hello: Hello) -> None:
        """Take over the counters of an engine that has died, of which some workers have heard more than others."""
        if hello.engine != self._id:  # the worker only lost its connection
            for key, value in hello.base.items():
                self._inherited[key] = max(value, self._inherited.get(key, 0.0))

    def base(self) -> Base:
        """The counters that would be lost with this process."""
        own = _samples(self._metrics.registry.collect(), _counts)
        return Base(self._id, _sum([self._inherited, *self._departed.values(), own]))

    async def total(self, workers: Mapping[str, Wire]) -> bytes:
        """The whole server in Prometheus' text format, as of now."""
        await self._gather(workers)
        reports = self._reports.values()
        there = [samples for each in reports for samples in (each.counters, each.gauges)]
        others = _sum([self._inherited, *self._departed.values(), *there])
        most = {
            name: max((each.gauges.get(name, 0.0) for each in reports), default=0.0)
            for name in (*LARGEST_GAUGES, READY)
        }

        def together(sample: Sample) -> float:
            if sample.name == READY:
                return min(sample.value, most[READY])
            if sample.name in most:
                return max(sample.value, most[sample.name])
            return sample.value + others.get(_key(sample), 0.0)

        families = list(self._metrics.registry.collect())
        for family in families:
            family.samples = [sample._replace(value=together(sample)) for sample in family.samples]
        return generate_latest(_Families(families))

    async def _gather(self, workers: Mapping[str, Wire]) -> None:
        self.asked += 1
        asked = self.asked
        for wire in workers.values():
            wire.send(ReportWanted(asked))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while len(self._reports) < self._n_workers or any(
                    self._is_late(name, asked) for name, wire in workers.items() if wire.open
                ):
                    self._booked.clear()
                    await self._booked.wait()
        except TimeoutError:
            late = ", ".join(name for name in workers if self._is_late(name, asked))
            n_reported = sum(not self._is_late(name, asked) for name in self._reports)
            if late or n_reported < self._n_workers:  # else the last report came just now
                why = f"late: {late}" if late else "the others are not connected"
                log.warning("%d of %d workers have reported; %s", n_reported, self._n_workers, why)

    def _is_late(self, worker: str, asked: int) -> bool:
        report = self._reports.get(worker)
        return report is None or report.asked < asked


class _Families:
    """The part of a registry that `generate_latest` uses."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _counts(family: Metric) -> bool:
    return family.type in COUNTERS


def _is_everybodys(family: Metric) -> bool:
    return family.name in (*SUMMED_GAUGES, *LARGEST_GAUGES, READY)


def _samples(families: Iterable[Metric], wanted: Callable[[Metric], bool]) -> Samples:
    return {_key(sample): sample.value for family in families if wanted(family) for sample in family.samples}


def _key(sample: Sample) -> str:
    return "\n".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))])


def _sum(parts: Iterable[Samples]) -> Samples:
    total: Samples = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total
