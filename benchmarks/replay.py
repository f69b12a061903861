"""A saved result of `benchmarks.serve`, simulated: the same jobs, arrival times and settings.

How fast the machine was during a level shows in its ticks. So the engine's costs are scaled until the simulated
ticks take as long on average; the factor is the level's pace, and should be near 1. Everything else (how full ticks
are, waiting times, throughput) has to follow from the simulation. The front end costs what the result says that it
added to a single request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from statistics import fmean
from typing import Any

from benchmarks.fleet import saturate, simulate
from benchmarks.fleet_report import Report
from benchmarks.tick_cost import TickCost
from benchmarks.traffic import Arrival, steady
from benchmarks.workloads import make_jobs
from service.engine.scheduler import SchedulerLimits
from service.settings import read_settings

TOLERANCE = 0.15
JUDGED = ("pace", "answered_per_second", "p99_ms")
"""Figures that must be within the tolerance. The others show where an error comes from."""
SLOWEST, HALVINGS = 8.0, 16


@dataclass(frozen=True)
class Comparison:
    """One figure, measured and simulated."""

    where: str
    figure: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1

    @property
    def good(self) -> bool:
        return self.figure not in JUDGED or abs(self.error) <= TOLERANCE


@dataclass(frozen=True)
class Replay:
    """What `benchmarks.serve` did, ready to be simulated."""

    result: Mapping[str, Any]
    jobs: Sequence[Arrival]  # all at 0
    limits: SchedulerLimits

    @classmethod
    def of(cls, result: Mapping[str, Any], limits: SchedulerLimits, vocab_size: int) -> Replay:
        """`vocab_size` is the tokenizer's: the jobs are drawn with it.

        Raises `ValueError` for a result that is of something else than is simulated: one batch, under several loads.
        """
        alone = read_settings(result["options"]["server_flags"]).replicas == 1
        if not alone or not all(figures["levels"] for figures in result["transports"].values()):
            raise ValueError("want a result of benchmarks.serve with --replicas=1 and with levels")
        jobs = make_jobs(result["options"]["workload"], result["options"]["requests"], vocab_size)
        return cls(result, [Arrival(0.0, job, sum(job.masked)) for job in jobs], limits)

    def compare(self, cost: TickCost) -> Iterator[Comparison]:
        """Every level of every transport, and the transport's capacity at the mean pace of its levels."""
        for transport, figures in self.result["transports"].items():
            own = replace(cost, outside=self.result["front_end"][transport]["added_ms"] / 1e3)
            capacity, paces = figures["capacity_per_second"], []
            for level in figures["levels"]:
                pace, report = self._at_its_pace(level, level["share"] * capacity, own)
                paces.append(pace)
                yield from _compare_level(f"{transport} {level['share']:.0%}", level, pace, report)
            full = saturate(self.jobs, figures["concurrency"], own.times(fmean(paces)), self.limits)
            yield Comparison(f"{transport} full", "answered_per_second", capacity, full.throughput)

    def _at_its_pace(self, level: Mapping[str, Any], rate: float, cost: TickCost) -> tuple[float, Report]:
        """The pace at which simulated ticks take as long as the level's, found by bisection."""
        # A level of a given time counts nothing of its first tenth; here all is counted.
        times = islice(steady(rate, math.inf), level.get("sent", level["requests"]))
        arrivals = [job._replace(time=time) for job, time in zip(cycle(self.jobs), times, strict=False)]
        low, high = 1 / SLOWEST, SLOWEST
        for _ in range(HALVINGS):
            pace = math.sqrt(low * high)
            report = simulate(arrivals, cost.times(pace), self.limits)
            low, high = (pace, high) if report.mean_tick_ms < level["mean_tick_ms"] else (low, pace)
        return pace, report


def _compare_level(where: str, level: Mapping[str, Any], pace: float, report: Report) -> Iterator[Comparison]:
    yield Comparison(where, "pace", pace, 1.0)
    yield Comparison(where, "answered_per_second", level["answered_per_second"], report.throughput)
    yield Comparison(where, "p50_ms", level["p50_ms"], report.latency_ms["p50"])
    yield Comparison(where, "p99_ms", level["p99_ms"], report.latency_ms["p99"])
    yield Comparison(where, "mean_tick_tokens", level["mean_tick_tokens"], report.mean_tick_tokens)
