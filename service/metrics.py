"""Every metric the service exports: name, unit, buckets. Label values come from fixed sets only, and all series exist
from the start, because a counter that appears with its first event hides that event from `rate` and `increase`.

One `Metrics` owns its registry, so nothing is global and a test can build as many as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, Protocol, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.calls import outcome_of
from service.engine.scheduler import SchedulerLimits
from service.engine.types import HaltReason, Outcome, Plan, Result
from service.errors import CODES, RefusalReason, Refused

Transport = Literal["rest", "grpc"]
RELOADS = ("swapped", "unchanged", "failed")

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
    def waiting_tokens(self) -> int: ...

    @property
    def live(self) -> int: ...


@dataclass(frozen=True)
class Declaration:
    """One metric, for whoever documents it. A label without values takes whatever the model is called."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    meaning: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    buckets: Sequence[float] = ()


class Metrics:
    def __init__(self, clock: Callable[[], float]) -> None:
        disable_created_metrics()  # else a second series for each counter and histogram
        self._clock = clock
        self.registry = CollectorRegistry()
        self.declared: list[Declaration] = []
        ends = ("ok", *(code for code in CODES if code != "failed_precondition"))  # of a reload, which is no request
        self.requests = self._counter(
            "requests",
            "Requests by how they ended: ok, or the error's code. Each text of a batch counts as one.",
            transport=get_args(Transport),
            outcome=ends,
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "Seconds from a valid request's arrival to its answer, of answered requests.",
            SECONDS,
        )
        self.queue_duration = self._histogram(
            "queue_duration_seconds",
            "Seconds in the queue, of answered requests. High: more arrives than is computed.",
            SECONDS,
        )
        self.compute_duration = self._histogram(
            "compute_duration_seconds",
            "Seconds from leaving the queue to the last pass, of answered requests. High: many passes or long ticks.",
            SECONDS,
        )
        self.steps_taken = self._histogram(
            "steps_taken", "Passes that an answered request took. High: more work for each request.", STEPS
        )
        self.halts = self._counter(
            "halts",
            "Answered requests by what ended their passes: gate (done early), max_steps (all were made) or deadline.",
            reason=get_args(HaltReason),
        )
        self.passes = self._counter("passes", "Passes made for answered requests, all together.")
        self.tokens = self._counter(
            "tokens", "Tokens of answered requests, masked or visible.", kind=("masked", "visible")
        )
        self.refused = self._counter(
            "refused",
            "Requests refused for want of room (queue_requests, queue_tokens, bodies, memory), or while not ready "
            "(the others).",
            reason=get_args(RefusalReason),
        )
        self.tick_duration = self._histogram(
            "tick_duration_seconds",
            "Seconds of one engine tick, in which a replica makes one pass over all it computes. Every "
            "request waits for whole ticks.",
            SECONDS,
        )
        self.tick_tokens = self._histogram(
            "tick_tokens",
            "Tokens of one engine tick, of all texts together. Near rdt_tick_tokens_limit: busy, as it should "
            "be under load.",
            TICK_TOKENS,
        )
        self.decoded_rows = self._counter(
            "decoded_rows",
            "Rows, one for each decoded token, through the vocabulary projection. High: many masks, or restore=all.",
        )
        self.decode_seconds = self._counter(
            "decode_seconds",
            "Seconds of ticks spent in the vocabulary projection, a part of rdt_tick_duration_seconds.",
        )
        self.broken_ticks = self._counter(
            "broken_ticks", "Ticks that failed, and with them all requests in them. Any is a fault; the log says which."
        )
        self.out_of_memory = self._counter(
            "out_of_memory",
            "Ticks that memory did not suffice for. Their requests begin anew, in smaller ticks if need be.",
        )
        self.workers_lost = self._counter(
            "workers_lost",
            "API workers whose connection to the engine ended without notice. Each loses its callers' requests.",
        )
        self.reloads = self._counter(
            "model_reloads",
            "Reloads of the checkpoint file: swapped (a new model serves), unchanged (the same file), failed "
            "(the old one stays).",
            outcome=RELOADS,
        )
        self.ready = self._gauge("ready", "1 while requests are taken, else 0.")
        self.live_requests = self._gauge("live_requests", "Requests being computed now, in all replicas.")
        self.waiting_requests = self._gauge(
            "waiting_requests", "Requests in the queue now. At rdt_waiting_requests_limit further ones are refused."
        )
        self.waiting_tokens = self._gauge(
            "waiting_tokens",
            "Tokens of the requests in the queue now. At rdt_waiting_tokens_limit further ones are refused.",
        )
        self.waiting_requests_limit = self._gauge(
            "waiting_requests_limit", "Requests that the queue may hold, as set by RDT_MAX_WAITING."
        )
        self.waiting_tokens_limit = self._gauge(
            "waiting_tokens_limit", "Tokens that the queue may hold, as set by RDT_MAX_WAITING_TOKENS."
        )
        self.replicas = self._gauge("replicas", "Replicas, that is, batches computed side by side.")
        self.tick_tokens_limit = self._gauge(
            "tick_tokens_limit",
            "Largest number of tokens in one engine tick now: the token budget, or less after memory ran short.",
        )
        self._model_info: Info | None = None  # until there is a model
        ProcessCollector(registry=self.registry)  # memory, CPU, start time, of this process
        labels = dict.fromkeys(("name", "digest", "device", "precision"), ())
        self.declared.append(Declaration("rdt_model_info", "info", "The model being served; always 1.", labels))

    def watch(self, engine: Occupancy) -> None:
        """Read the gauges from this engine from now on."""
        self.live_requests.set_function(lambda: engine.live)
        self.waiting_requests.set_function(lambda: engine.waiting)
        self.waiting_tokens.set_function(lambda: engine.waiting_tokens)

    def watch_budget(self, largest_tick: Callable[[], int]) -> None:
        self.tick_tokens_limit.set_function(largest_tick)

    def watch_readiness(self, ready: Callable[[], bool]) -> None:
        self.ready.set_function(lambda: float(ready()))

    def describe_bounds(self, bounds: SchedulerLimits, replicas: int) -> None:
        self.replicas.set(replicas)
        self.waiting_requests_limit.set(bounds.max_waiting)
        self.waiting_tokens_limit.set(bounds.max_waiting_tokens)

    def describe_model(self, name: str, digest: str, device: str, precision: str) -> None:
        """The model that requests meet from now on."""
        if self._model_info is None:
            self._model_info = Info("rdt_model", "The model being served.", registry=self.registry)
        self._model_info.info({"name": name, "digest": digest, "device": device, "precision": precision})

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
            self.requests.labels(transport, outcome_of(error)).inc()
            if isinstance(error, Refused):
                self.refused.labels(error.reason).inc()
            raise

    def left(self, transport: Transport) -> None:
        """Counts a request whose caller left before anything was done about it."""
        self.requests.labels(transport, "cancelled").inc()

    def answered(self, result: Result, n_masked: int) -> None:
        """Accounts for the work behind one answer."""
        self.queue_duration.observe(result.queue_seconds)
        self.compute_duration.observe(result.compute_seconds)
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
        self.decode_seconds.inc(outcome.decode_seconds)

    def tick_broke(self) -> None:
        """Accounts for a tick that failed."""
        self.broken_ticks.inc()

    def memory_ran_out(self) -> None:
        """Accounts for a tick that there was no memory for."""
        self.out_of_memory.inc()

    async def scrape(self) -> bytes:
        """What `/metrics` answers: the metrics of the whole server, of other processes too where there are any."""
        return self.exposition()

    def exposition(self) -> bytes:
        """The metrics of this registry, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, **labels: Sequence[str]) -> Counter:
        counter = Counter(f"rdt_{name}_total", meaning, tuple(labels), registry=self.registry)
        for values in product(*labels.values()) if labels else ():
            counter.labels(*values)
        self.declared.append(Declaration(f"rdt_{name}_total", "counter", meaning, labels))
        return counter

    def _gauge(self, name: str, meaning: str) -> Gauge:
        self.declared.append(Declaration(f"rdt_{name}", "gauge", meaning))
        return Gauge(f"rdt_{name}", meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        self.declared.append(Declaration(f"rdt_{name}", "histogram", meaning, buckets=buckets))
        return Histogram(f"rdt_{name}", meaning, buckets=buckets, registry=self.registry)
