"""The results of a simulation: records of every replica, and figures of the fleet."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTS = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass
class Books:
    """Records of one replica. `latencies` and `queueing` are seconds, in the order of answers."""

    seconds: float = 0.0  # until its last tick ended
    n_refused: int = 0
    n_ticks: int = 0
    n_tokens: int = 0
    steps_shed: int = 0
    busy_seconds: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    queueing: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Report:
    """Figures of a fleet. Rates are of all replicas together; spreads are the lowest and highest of one replica."""

    seconds: float  # until the last answer
    arrived: int
    answered: int
    refused: int
    throughput: float  # answers a second
    utilisation: float
    mean_tick_tokens: float
    mean_tick_ms: float
    latency_ms: dict[str, float]
    queue_ms: dict[str, float]
    steps_shed: int
    utilisation_spread: tuple[float, float]
    p99_ms_spread: tuple[float, float]
    latencies: np.ndarray = field(repr=False)  # seconds, all of them

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.arrived)

    def share_within(self, seconds: float) -> float:
        """Of all that arrived, the share that was answered in time."""
        return float((self.latencies <= seconds).sum()) / max(1, self.arrived)

    def figures(self) -> dict[str, Any]:
        """For people and for JSON."""
        named = {name: value for name, value in vars(self).items() if name != "latencies"}
        return _rounded({**named, "refused_share": self.refused_share})


def report(replicas: Sequence[Books]) -> Report:
    seconds = max(books.seconds for books in replicas)
    latencies, queueing = (np.concatenate([getattr(b, name) for b in replicas]) for name in ("latencies", "queueing"))
    refused, n_ticks = sum(books.n_refused for books in replicas), sum(books.n_ticks for books in replicas)
    busy = [books.busy_seconds for books in replicas]
    p99s = [percentiles_ms(np.array(books.latencies))["p99"] for books in replicas]
    return Report(
        seconds=seconds,
        arrived=len(latencies) + refused,
        answered=len(latencies),
        refused=refused,
        throughput=len(latencies) / max(seconds, 1e-9),
        utilisation=sum(busy) / max(seconds * len(replicas), 1e-9),
        mean_tick_tokens=sum(books.n_tokens for books in replicas) / max(1, n_ticks),
        mean_tick_ms=sum(busy) / max(1, n_ticks) * 1e3,
        latency_ms=percentiles_ms(latencies),
        queue_ms=percentiles_ms(queueing),
        steps_shed=sum(books.steps_shed for books in replicas),
        utilisation_spread=(min(busy) / max(seconds, 1e-9), max(busy) / max(seconds, 1e-9)),
        p99_ms_spread=(min(p99s), max(p99s)),
        latencies=latencies,
    )


def percentiles_ms(seconds: np.ndarray) -> dict[str, float]:
    """Percentiles, each the smallest value that so many percent do not exceed, and the maximum; 0 without values."""
    if len(seconds) == 0:
        return dict.fromkeys(PERCENTS, 0.0)
    ranked = np.percentile(seconds, tuple(PERCENTS.values()), method="inverted_cdf") * 1e3
    return dict(zip(PERCENTS, ranked.tolist(), strict=True))


def _rounded(value: Any) -> Any:
    """Rounded to four digits, more than a simulation is exact to."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
