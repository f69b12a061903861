"""Spans: what they say of a call, and whose trace they belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from rdt_core import ModelConfig, Tokenizer
from service.calls import Call
from service.engine.types import Job, Reading
from service.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from service.rpc.convert import INFERENCE_SERVICE
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from service.rpc.pb.open_inference_pb2 import ModelMetadataRequest
from service.tracing import NO_TRACER, Tracer
from tests.fakes import FakeEngine, Service, fake_result

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.tracing.otel import MAX_SHOWN_PASSES, OtelTracer, exporter_to

ServiceOf = Callable[[Tracer], Service]
TEXT = "the [MASK] dog"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Recorded:
    """A tracer, and the spans that came out of it."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer(self._exporter)

    def spans(self) -> list[ReadableSpan]:
        """In the order they began. Closes the tracer."""
        self.tracer.close()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def span(self) -> ReadableSpan:
        (span,) = self.spans()
        return span


@pytest.fixture(autouse=True)
def _no_variables_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    yield recorded
    recorded.tracer.close()


@pytest.fixture
def service_of(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> ServiceOf:
    return lambda tracer: Service(tiny_tokenizer, tiny_config, tracer=tracer).open()


@pytest.fixture
def traced(service_of: ServiceOf, recorded: Recorded) -> Service:
    return service_of(recorded.tracer)


WORK = {
    "rdt.outcome": "ok", "rdt.queue_ms": 250.0, "rdt.compute_ms": 500.0, "rdt.decode_ms": 0.0, "rdt.steps": 2,
    "rdt.max_steps": 8, "rdt.level": pytest.approx(1 / 3), "rdt.halt_reason": "gate", "rdt.halting": "gate",
    "rdt.n_tokens": 5, "rdt.n_masked": 1, "rdt.model": "tiny@0123456789ab",
}  # fmt: skip


async def test_one_span_for_an_http_request(traced: Service, recorded: Recorded) -> None:
    async with traced.client() as client:
        headers = {"X-Request-Id": "abc-1", "traceparent": TRACEPARENT, "tracestate": "vendor=1"}
        assert (await client.post("/denoise", json={"text": TEXT}, headers=headers)).status_code == 200
        await client.get("/health/live")
        await client.get("/metrics")
    span = recorded.span()
    assert (span.name, span.kind, span.status.status_code) == ("POST /denoise", SpanKind.SERVER, StatusCode.UNSET)
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST", "http.route": "/denoise", "http.response.status_code": 200,
        "rdt.request_id": "abc-1", **WORK,
    }  # fmt: skip
    check_parent(span)
    check_events(span)
    assert "dog" not in span.to_json()


def test_a_call_learns_the_trace_it_belongs_to(recorded: Recorded) -> None:
    """Its lines in the log name it."""
    call = Call("abc-1")
    with recorded.tracer.call(call, "POST /denoise", {}, {"traceparent": TRACEPARENT}):
        assert call.trace_id == TRACE


async def test_one_span_for_a_grpc_call(traced: Service, recorded: Recorded) -> None:
    async with traced.channel() as channel:
        metadata = (("x-request-id", "abc-1"), ("traceparent", TRACEPARENT), ("tracestate", "vendor=1"))
        await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT), metadata=metadata)
    span = recorded.span()
    assert (span.name, span.kind) == ("rdt.v1.Denoiser/Denoise", SpanKind.SERVER)
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc", "rpc.service": "rdt.v1.Denoiser", "rpc.method": "Denoise", "rpc.grpc.status_code": 0,
        "rdt.request_id": "abc-1", **WORK,
    }  # fmt: skip
    check_parent(span)
    check_events(span)
    assert "dog" not in span.to_json()


async def test_health_over_grpc_is_no_span(traced: Service, recorded: Recorded) -> None:
    async with traced.channel() as channel:
        call = HealthStub(channel).Check(HealthCheckRequest())
        await call
        assert "x-request-id" not in dict(await call.trailing_metadata() or ())
    assert recorded.spans() == []


async def test_a_grpc_call_that_restores_nothing_is_no_span(traced: Service, recorded: Recorded) -> None:
    """As no GET is."""
    async with traced.channel() as channel:
        for method in ("ServerLive", "ServerReady", "ServerMetadata"):
            await channel.unary_unary(f"/{INFERENCE_SERVICE}/{method}")(b"")
        named = ModelMetadataRequest(name="tiny").SerializeToString()
        for method in ("ModelReady", "ModelMetadata"):
            await channel.unary_unary(f"/{INFERENCE_SERVICE}/{method}")(named)
        call = DenoiserStub(channel).GetModel(pb.GetModelRequest())
        await call
        assert "x-request-id" in dict(await call.trailing_metadata() or ())
    assert recorded.spans() == []


def check_parent(span: ReadableSpan) -> None:
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert dict(span.context.trace_state) == {"vendor": "1"}


def check_events(span: ReadableSpan) -> None:
    """0.25 s in the queue, 0.5 s from there to the last pass; that a fake takes no time for passes shows as well."""
    names = [event.name for event in span.events]
    assert names == ["queued", "admitted", "pass", "decode", "pass"]
    queued, admitted, _, decode, last = (event.timestamp for event in span.events)
    assert admitted - queued == 250_000_000
    assert last - admitted == 500_000_000
    assert decode == last
    assert span.end_time is not None
    assert last <= span.end_time
    passes = [dict(event.attributes or {}) for event in span.events if event.name == "pass"]
    assert passes == [{"rdt.step": 1, "rdt.level": 0.5}, {"rdt.step": 2, "rdt.level": pytest.approx(1 / 3)}]


@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_items_of_a_batch_are_below_their_call(traced: Service, recorded: Recorded, transport: str) -> None:
    if transport == "rest":
        async with traced.client() as client:
            items = [{"text": TEXT}, {"text": "a", "max_steps": 0}]
            await client.post("/denoise/batch", json={"items": items})
    else:
        async with traced.channel() as channel:
            messages = [pb.DenoiseRequest(text=TEXT), pb.DenoiseRequest(text="a", max_steps=0)]
            await DenoiserStub(channel).DenoiseBatch(pb.DenoiseBatchRequest(items=messages))
    call, first, second = recorded.spans()
    assert call.name == ("POST /denoise/batch" if transport == "rest" else "rdt.v1.Denoiser/DenoiseBatch")
    assert "rdt.steps" not in (call.attributes or {})
    assert [item.parent and item.parent.span_id for item in (first, second)] == [call.context.span_id] * 2
    assert dict(first.attributes or {}) == {"rdt.item": 0, **WORK}
    assert dict(second.attributes or {}) == {"rdt.item": 1, "rdt.outcome": "invalid_argument"}
    assert (second.status.status_code, second.events) == (StatusCode.UNSET, ()), "no text of an exception"


@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_a_stream_is_one_span(traced: Service, recorded: Recorded, transport: str) -> None:
    if transport == "rest":
        async with traced.client() as client:
            await client.post("/denoise/stream", json={"text": TEXT})
    else:
        async with traced.channel() as channel:
            _ = [event async for event in DenoiserStub(channel).DenoiseStream(pb.DenoiseRequest(text=TEXT))]
    span = recorded.span()
    assert [event.name for event in span.events] == ["queued", "admitted", "pass", "pass"], "every pass decodes"
    assert (span.attributes or {})["rdt.steps"] == 2


@pytest.mark.parametrize("transport", ["rest", "grpc"])
async def test_a_stream_that_fails_midway(traced: Service, recorded: Recorded, transport: str) -> None:
    traced.engine.error, traced.engine.error_after_pass = Internal("broken"), 1
    if transport == "rest":
        async with traced.client() as client:
            await client.post("/denoise/stream", json={"text": TEXT})
    else:
        async with traced.channel() as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [event async for event in DenoiserStub(channel).DenoiseStream(pb.DenoiseRequest(text=TEXT))]
    span = recorded.span()
    assert (span.attributes or {})["rdt.outcome"] == "internal"
    assert span.status.status_code == StatusCode.ERROR


@pytest.mark.parametrize(
    ("error", "outcome", "numbers", "status"),
    [
        (Internal("broken"), "internal", (500, 13), StatusCode.ERROR),
        (RuntimeError("a bug"), "internal", (500, 13), StatusCode.ERROR),
        (Unavailable("draining", "draining"), "unavailable", (503, 14), StatusCode.ERROR),
        (ResourceExhausted("full", "queue_requests"), "resource_exhausted", (429, 8), StatusCode.UNSET),
        (DeadlineExceeded("late"), "deadline_exceeded", (504, 4), StatusCode.UNSET),
    ],
)
async def test_only_our_faults_are_errors(
    service_of: ServiceOf, error: Exception, outcome: str, numbers: tuple[int, int], status: StatusCode
) -> None:
    recorded = Recorded()
    traced = service_of(recorded.tracer)
    traced.engine.error = error
    async with traced.client() as client, traced.channel() as channel:
        assert (await client.post("/denoise", json={"text": TEXT})).status_code == numbers[0]
        with pytest.raises(grpc.aio.AioRpcError):
            await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT))
    rest, called = recorded.spans()
    for span in (rest, called):
        assert (span.attributes or {})["rdt.outcome"] == outcome
        assert span.status.status_code == status
        assert ("error.type" in (span.attributes or {})) == (status == StatusCode.ERROR)
        assert not span.events, "no text of an exception"
        assert span.status.description is None
    assert (rest.attributes or {})["http.response.status_code"] == numbers[0]
    assert (called.attributes or {})["rpc.grpc.status_code"] == numbers[1]


async def test_a_caller_who_leaves(traced: Service, recorded: Recorded) -> None:
    traced.engine.held = asyncio.Event()
    async with traced.channel() as channel:
        call = DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT))
        await traced.until_live(1)
        call.cancel()
        await traced.until_live(0)
    span = recorded.span()
    assert (span.attributes or {})["rdt.outcome"] == "cancelled"
    assert span.status.status_code == StatusCode.UNSET


@pytest.mark.parametrize(
    "traceparent", ["", "x", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", "ff" + TRACEPARENT[2:], "0" * 10_000]
)
async def test_a_bad_trace_context_is_no_context(
    traced: Service, recorded: Recorded, traceparent: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with traced.client() as client, traced.channel() as channel:
        await client.post("/denoise", json={"text": TEXT}, headers={"traceparent": traceparent})
        metadata = (("traceparent", traceparent[:4000]),)
        await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT), metadata=metadata)
    assert [span.parent for span in recorded.spans()] == [None, None]
    assert caplog.text == ""


async def test_a_trace_state_may_come_in_several_headers(traced: Service, recorded: Recorded) -> None:
    async with traced.client() as client:
        headers = [("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
        await client.post("/denoise", json={"text": TEXT}, headers=headers)
    assert dict(recorded.span().context.trace_state) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("tracestate", ["no pairs", "a=1," * 200, "ä=1"])
async def test_a_bad_trace_state_is_left_out(
    traced: Service, recorded: Recorded, tracestate: str, caplog: pytest.LogCaptureFixture
) -> None:
    exporter_to("http://127.0.0.1:1").shutdown()  # whoever sends spans keeps the library from quoting it
    async with traced.client() as client:
        headers = {"traceparent": TRACEPARENT, "tracestate": tracestate.encode()}
        await client.post("/denoise", json={"text": TEXT}, headers=headers)  # type: ignore[arg-type] # str and bytes
    span = recorded.span()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert len(span.context.trace_state) == 0
    assert caplog.text == ""


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_always_on"])
async def test_what_is_not_sampled_is_not_recorded(
    service_of: ServiceOf, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    recorded = Recorded()
    service, headers = service_of(recorded.tracer), {"traceparent": TRACEPARENT[:-1] + "0"}
    async with service.client() as client:
        assert (await client.post("/denoise", json={"text": TEXT}, headers=headers)).status_code == 200
    assert recorded.spans() == []


def test_a_long_time_line_keeps_its_beginning(recorded: Recorded) -> None:
    job = Job([0], [True], 1000, 0.0, "settle")
    with recorded.tracer.call(Call("a"), "a", {}, {}):
        timeline = recorded.tracer.timeline()
        assert timeline is not None
        for _ in range(1000):
            timeline(Reading(0.5, None, [], []))
        timeline.answered(job, fake_result(job, 0, steps=1000), "tiny")
    span = recorded.span()
    assert [event.name for event in span.events] == ["queued", "admitted", *["pass"] * MAX_SHOWN_PASSES]
    assert span.dropped_events == 0
    assert (span.attributes or {})["rdt.steps"] == 1000


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "rdt"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,a=b"}, "mine"),
    ],
)
def test_the_name_of_the_service(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    recorded = Recorded()
    with recorded.tracer.call(Call("a"), "a", {}, {}):
        pass
    assert recorded.span().resource.attributes["service.name"] == name


async def test_only_what_is_watched_reports_its_passes(
    service_of: ServiceOf, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    watched: list[bool] = []
    submit = FakeEngine.submit

    async def spy(engine: FakeEngine, job: Job, place: object, on_reading: object = None) -> object:
        watched.append(on_reading is not None)
        return await submit(engine, job, place, on_reading)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeEngine, "submit", spy)
    for tracer in (NO_TRACER, recorded.tracer):
        async with service_of(tracer).client() as client:
            await client.post("/denoise", json={"text": TEXT})
    assert watched == [False, True]
