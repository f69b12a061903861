"""Simulated traffic: arrival times, at a constant rate or over a day, and jobs drawn from a workload."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from benchmarks.workloads import WORKLOADS
from service.engine.types import Job

DAY_SECONDS = 86_400.0


class Arrival(NamedTuple):
    """A request as the scheduler sees it: only the number of its tokens and masks matters."""

    time: float  # seconds
    job: Job
    n_masked: int

    @classmethod
    def of(cls, time: float, n_tokens: int, n_masked: int, depth: int) -> Arrival:
        return cls(time, _job(n_tokens, n_masked, depth), n_masked)


def draw(workload: str, times: Iterable[float], seed: int = 0) -> Iterator[Arrival]:
    """A request of the workload at each of these times: lengths, masks and depths as `make_jobs` draws them."""
    rng = random.Random(seed)
    for time in times:
        shape = WORKLOADS[workload](rng)
        yield Arrival.of(time, shape.length, shape.n_masked, shape.depth)


def steady(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Poisson arrivals, `rate` a second."""
    rng, now = random.Random(seed), 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now


def daily(trough: float, peak: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Poisson arrivals whose rate follows a sine over the day: `trough` at midnight, `peak` at noon."""
    rng = random.Random(seed)
    for time in steady(peak, seconds, seed + 1):
        rate = trough + (peak - trough) * (1 - math.cos(2 * math.pi * time / DAY_SECONDS)) / 2
        if rng.random() * peak < rate:
            yield time


@cache
def _job(n_tokens: int, n_masked: int, depth: int) -> Job:
    masked = [row < n_masked for row in range(n_tokens)]
    return Job([0] * n_tokens, masked, depth, threshold=0.0, halting="gate")
