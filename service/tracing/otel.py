"""Spans by OpenTelemetry, sent to an OTLP collector in the background. Needs the extra `otel`.

The standard variables hold: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`,
`OTEL_EXPORTER_OTLP_HEADERS` and the rest of the exporter's.

Each request is one span. Its events say how the time was used: `queued`, `admitted`, a `pass` for each pass, and
`decode` where decoding is timed separately. A collector that is slow or away costs spans and does not delay requests:
the queue to it is bounded, and what does not fit is dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.calls import Call, milliseconds, outcome_of
from service.engine.types import Job, Reading, Result
from service.tracing import CONTEXT_HEADERS, Timeline
from service.version import release

CLOSE_SECONDS = 2.0
"""How long the last spans may take to be sent when the server ends."""

MAX_SHOWN_PASSES = 100
"""A span holds 128 events, and throws out the first when there are more."""

MAX_CONTEXT_CHARACTERS = 512
"""Longest context header that is read: as much as W3C Trace Context asks everybody to pass on."""

OUR_FAULTS = ("internal", "unavailable")
"""Outcomes that make a span an error; for the others the caller is to blame."""


class OtelTracer:
    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rdt")
        self._context = TraceContextTextMapPropagator()

    @contextmanager
    def call(
        self, call: Call, name: str, attributes: Mapping[str, str], headers: Mapping[str, str]
    ) -> Iterator[trace.Span]:
        sent = {name: headers.get(name, "") for name in CONTEXT_HEADERS}
        parent = self._context.extract({k: v for k, v in sent.items() if len(v) <= MAX_CONTEXT_CHARACTERS})
        span = self._tracer.start_span(
            name, parent, trace.SpanKind.SERVER, {**attributes, "rdt.request_id": call.id}, record_exception=False
        )
        call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield span
            finally:
                _conclude(span, call.outcome)

    @contextmanager
    def item(self, index: int) -> Iterator[None]:
        outcome = "ok"
        with self._tracer.start_as_current_span(
            "item", attributes={"rdt.item": index}, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                outcome = outcome_of(error)
                raise
            finally:
                _conclude(span, outcome)

    def timeline(self) -> Timeline | None:
        span = trace.get_current_span()
        return _SpanTimeline(span) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left for at most `CLOSE_SECONDS`; then the exporter is shut down, retries included."""
        overtime = threading.Timer(CLOSE_SECONDS, self._exporter.shutdown)
        overtime.daemon = True
        overtime.start()
        self._provider.shutdown()
        overtime.cancel()


class _SpanTimeline:
    """Remembers when passes were made, and writes them on the span once the request is answered."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._passes: list[tuple[int, float]] = []  # when, in nanoseconds since 1970, and level
        self._last = 0

    def __call__(self, reading: Reading) -> None:
        self._last = time.time_ns()
        if len(self._passes) < MAX_SHOWN_PASSES:
            self._passes.append((self._last, reading.level))

    def answered(self, job: Job, result: Result, model: str) -> None:
        """The engine's durations, laid out backwards from the last pass.

        A job that is read after every pass decodes in many: the sum of that has no place on a time line.
        """
        span, halted = self._span, self._last or time.time_ns()
        span.set_attributes(
            {
                "rdt.queue_ms": milliseconds(result.queue_seconds),
                "rdt.compute_ms": milliseconds(result.compute_seconds),
                "rdt.decode_ms": milliseconds(result.decode_seconds),
                "rdt.steps": result.steps,
                "rdt.max_steps": result.max_steps,
                "rdt.level": result.levels[-1],
                "rdt.halt_reason": result.reason,
                "rdt.halting": job.halting,
                "rdt.n_tokens": len(job.tokens),
                "rdt.n_masked": sum(job.masked),
                "rdt.model": model,
            }
        )
        admitted = halted - _nanoseconds(result.compute_seconds)
        span.add_event("queued", timestamp=admitted - _nanoseconds(result.queue_seconds))
        span.add_event("admitted", timestamp=admitted)
        decoding = halted - _nanoseconds(result.decode_seconds) if not job.read_every_pass else None
        for step, (made, level) in enumerate(self._passes, start=1):
            if step == result.steps and decoding is not None:
                span.add_event("decode", timestamp=decoding)
            span.add_event("pass", {"rdt.step": step, "rdt.level": level}, timestamp=made)


def exporter_to(endpoint: str) -> SpanExporter:
    for name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their warnings quote callers' bad headers
    return OTLPSpanExporter(endpoint=endpoint)


def _resource() -> Resource:
    """The sender of the spans: "rdt", unless the environment names it otherwise."""
    return Resource.create(
        {"service.name": "rdt", "service.version": release(), **OTELResourceDetector().detect().attributes}
    )


def _conclude(span: trace.Span, outcome: str) -> None:
    span.set_attribute("rdt.outcome", outcome)
    if outcome in OUR_FAULTS:
        span.set_attribute("error.type", outcome)
        span.set_status(trace.Status(trace.StatusCode.ERROR))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
