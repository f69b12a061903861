"""Every metric the service exports: name, unit, buckets. Label values come from fixed sets only.

One `Metrics` owns its registry, so nothing is global and a test can build as many as it likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from service.engine.types import Outcome, Plan, Result
from service.errors import Refused, ServiceError

Transport = Literal["rest", "grpc"]

# Seconds. A two-pass request of a small model takes ten milliseconds, a queue under load many seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# Passes: fine where halting early matters.
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)


# Packed tokens: powers of two up to a large GPU's tick.
TICK_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


class Occupancy(Protocol):
    """What the gauges read from an engine."""

    @property
    def waiting(self) -> int: ...

    @property
    def live(self) -> int: ...


class Metrics:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by end: ok or the error's code.", "transport", "outcome")
        self.request_duration = self._histogram(
            "request_duration_seconds", "Seconds from a valid request's arrival to its answer.", SECONDS
        )
        self.queue_duration = self._histogram(
            "queue_duration_seconds", "Seconds in the queue, of answered requests.", SECONDS
        )
        self.steps_taken = self._histogram("steps_taken", "Passes made for an answered request.", STEPS)
        self.halts = self._counter("halts", "Answered requests by what ended the recursion.", "reason")
        self.passes = self._counter("passes", "Passes made for answered requests.")
        self.tokens = self._counter("tokens", "Tokens of answered requests, masked or visible.", "kind")
        self.refused = self._counter("refused", "Requests refused for want of room, or while not ready.", "reason")
        self.tick_duration = self._histogram("tick_duration_seconds", "Seconds of one engine tick.", SECONDS)
        self.tick_tokens = self._histogram("tick_tokens", "Packed tokens of one engine tick.", TICK_TOKENS)
        self.decoded_rows = self._counter("decoded_rows", "Rows that went through the vocabulary projection.")
        self.live_requests = self._gauge("live_requests", "Requests being computed now.")
        self.waiting_requests = self._gauge("waiting_requests", "Requests queued now.")
        self.model_info = Info("rdt_model", "The model being served.", registry=self.registry)

    def watch(self, engine: Occupancy) -> None:
        """Read the gauges from this engine from now on."""
        self.live_requests.set_function(lambda: engine.live)
        self.waiting_requests.set_function(lambda: engine.waiting)

    def describe_model(self, name: str, digest: str, device: str, precision: str) -> None:
        self.model_info.info({"name": name, "digest": digest, "device": device, "precision": precision})

    @contextmanager
    def request(self, transport: Transport) -> Iterator[None]:
        """Counts and times one request, however it ends."""
        began = self._clock()
        with self.failure(transport):
            yield
        self.requests.labels(transport, "ok").inc()
        self.request_duration.observe(self._clock() - began)

    @contextmanager
    def failure(self, transport: Transport) -> Iterator[None]:
        """Counts a request that ends here with an error, and nothing else."""
        try:
            yield
        except BaseException as error:
            self.requests.labels(transport, _outcome(error)).inc()
            if isinstance(error, Refused):
                self.refused.labels(error.reason).inc()
            raise

    def answered(self, result: Result, n_masked: int) -> None:
        """Accounts for the work behind one answer."""
        self.queue_duration.observe(result.queue_seconds)
        self.steps_taken.observe(result.steps)
        self.halts.labels(result.reason).inc()
        self.passes.inc(result.steps)
        self.tokens.labels("masked").inc(n_masked)
        self.tokens.labels("visible").inc(len(result.tokens) - n_masked)

    def ticked(self, seconds: float, plan: Plan, outcome: Outcome) -> None:
        """Accounts for one tick of the engine."""
        self.tick_duration.observe(seconds)
        self.tick_tokens.observe(plan.n_tokens)
        self.decoded_rows.inc(outcome.n_decoded)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, unit: str, *labels: str) -> Counter:
        return Counter(f"rdt_{name}_total", unit, labels, registry=self.registry)

    def _gauge(self, name: str, unit: str) -> Gauge:
        return Gauge(f"rdt_{name}", unit, registry=self.registry)

    def _histogram(self, name: str, unit: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"rdt_{name}", unit, buckets=buckets, registry=self.registry)


def _outcome(error: BaseException) -> str:
    if isinstance(error, ServiceError):
        return error.code
    left = isinstance(error, asyncio.CancelledError | GeneratorExit)  # GeneratorExit: left between two passes
    return "cancelled" if left else "internal"
