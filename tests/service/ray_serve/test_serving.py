"""Calls and requests on their way through Serve, without a cluster: in front of a replica and inside."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from service.rpc.convert import DENOISER, INFERENCE
from service.rpc.errors import status_of
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb import open_inference_pb2 as oip
from tests.fakes import MAX_BODY_BYTES, Service

pytest.importorskip("ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, about pydantic
    from ray.exceptions import ActorDiedError

    from service.ray_serve import proxy
    from service.ray_serve.edge import Edge
    from service.ray_serve.replica import Replica
    from service.ray_serve.rpc import ServeCalls

KEY = "sesame"


class FakeServeContext:
    """What Serve hands to a replica beside a message, and what it sends back of it."""

    def __init__(self, **metadata: str) -> None:
        self._sent = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, Any] = {}

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return self._sent

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, Any]]) -> None:
        self.trailing = dict(trailing_metadata)


def calls_of(service: Service, api_key: str | None = None) -> ServeCalls:
    return ServeCalls(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES, api_key=api_key)


def encoded(**fields: Any) -> bytes:
    return pb.DenoiseRequest(**fields).SerializeToString()


# gRPC inside a replica


@pytest.mark.parametrize("message", [encoded(text="a", max_steps=0), encoded(), b"\xff\xff", encoded(text="a " * 40)])
async def test_errors_are_those_of_a_single_server(service: Service, message: bytes) -> None:
    context = FakeServeContext(x_request_id="mine")
    assert (await calls_of(service).unary("Denoise", message, context)).SerializeToString() == b""
    async with service.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/rdt.v1.Denoiser/Denoise")(message, metadata=(("x-request-id", "mine"),))
    assert (context.code, context.details) == (raised.value.code(), raised.value.details())
    assert context.trailing == dict(raised.value.trailing_metadata())


async def test_answers_and_passes(service: Service) -> None:
    calls = calls_of(service)
    answer = pb.DenoiseResponse.FromString(
        (await calls.unary("Denoise", encoded(text="the [MASK]"), FakeServeContext())).SerializeToString()
    )
    assert answer.text == "the fox"
    events = [
        pb.DenoiseEvent.FromString(event.SerializeToString()).WhichOneof("event")
        async for event in calls.stream("DenoiseStream", encoded(text="the [MASK]"), FakeServeContext())
    ]
    assert events == ["pass", "pass", "answer"]
    assert (await calls.unary("GetModel", b"", FakeServeContext())).SerializeToString()
    batch = pb.DenoiseBatchRequest(items=[pb.DenoiseRequest(text="a")]).SerializeToString()
    answered = await calls.unary("DenoiseBatch", batch, FakeServeContext())
    assert pb.DenoiseBatchResponse.FromString(answered.SerializeToString()).results[0].HasField("answer")
    assert service.sample("rdt_requests_total", transport="grpc", outcome="ok") == 3


async def test_the_open_inference_protocol_is_there_too(service: Service) -> None:
    """Every call answers as on a single server; of `ModelInfer` what it refuses, since answers have times."""
    calls = calls_of(service)
    requests = {
        "ServerLive": b"", "ServerReady": b"", "ServerMetadata": b"", "ModelReady": oip.ModelReadyRequest(name="tiny"),
        "ModelMetadata": oip.ModelMetadataRequest(name="tiny"), "ModelInfer": oip.ModelInferRequest(model_name="other"),
    }  # fmt: skip
    assert set(requests) == {call.name for call in INFERENCE.methods}
    async with service.channel() as channel:
        for method, request in requests.items():
            message = request if isinstance(request, bytes) else request.SerializeToString()
            context = FakeServeContext(x_request_id="mine")
            answer = (await calls.unary(method, message, context)).SerializeToString()
            call = channel.unary_unary(f"/{INFERENCE.full_name}/{method}")(
                message, metadata=(("x-request-id", "mine"),)
            )
            if method == "ModelInfer":
                assert (context.code, context.details) == (await call.code(), await call.details())
                assert context.code == grpc.StatusCode.NOT_FOUND
            else:
                assert answer == await call
                assert answer


def test_a_replica_has_every_call() -> None:
    for described in (DENOISER, INFERENCE):
        for call in described.methods:
            assert callable(getattr(Replica, call.name)), call.full_name


async def test_a_stream_that_fails_ends_with_an_empty_message_and_a_status(service: Service) -> None:
    context = FakeServeContext()
    service.engine.error, service.engine.error_after_pass = RuntimeError("a bug"), 1
    events = [event async for event in calls_of(service).stream("DenoiseStream", encoded(text="[MASK]"), context)]
    assert [bool(event.message) for event in events] == [True, False]
    assert context.code == grpc.StatusCode.INTERNAL
    assert "a bug" not in context.details


async def test_a_stream_that_is_left_frees_the_engine(service: Service) -> None:
    service.engine.held = asyncio.Event()
    events = calls_of(service).stream("DenoiseStream", encoded(text="[MASK]"), FakeServeContext())
    await anext(events)
    assert service.engine.live == 1
    await events.aclose()
    assert (service.engine.live, service.engine.n_left) == (0, 1)


async def test_the_calls_own_deadline_arrives(service: Service) -> None:
    context = FakeServeContext(**{proxy.SECONDS_LEFT.replace("-", "_"): "60.0"})
    await calls_of(service).unary("Denoise", encoded(text="[MASK]"), context)
    deadline = service.engine.jobs[0].deadline
    assert deadline is not None
    assert 59 < deadline - service.clock() <= 60
    await calls_of(service).unary("Denoise", encoded(text="[MASK]"), FakeServeContext())
    assert service.engine.jobs[1].deadline is None


@pytest.mark.parametrize("metadata", [{}, {"x_api_key": "wrong"}, {"authorization": "Bearer wrong"}])
async def test_the_key_is_asked_for(service: Service, metadata: dict[str, str]) -> None:
    for context, answer in [(FakeServeContext(**metadata), "unary"), (FakeServeContext(**metadata), "stream")]:
        calls = calls_of(service, KEY)
        if answer == "unary":
            await calls.unary("GetModel", b"", context)
        else:
            assert [e.message async for e in calls.stream("DenoiseStream", encoded(text="a"), context)] == [b""]
        assert context.code == grpc.StatusCode.UNAUTHENTICATED
    assert service.engine.jobs == []
    context = FakeServeContext(authorization=f"Bearer {KEY}")
    assert (await calls_of(service, KEY).unary("GetModel", b"", context)).message
    assert context.code is None


async def test_a_message_over_the_limit_is_refused(service: Service) -> None:
    context = FakeServeContext()
    await calls_of(service).unary("Denoise", b"\x0a" * (MAX_BODY_BYTES + 1), context)
    assert (context.code, context.details) == (
        grpc.StatusCode.INVALID_ARGUMENT, f"the message is larger than {MAX_BODY_BYTES} bytes",
    )  # fmt: skip


# In front of the replicas


class FakeProxyContext:
    """gRPC's own context of a call that arrives at Serve's proxy."""

    def __init__(self, time_remaining: float | None = None, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._left, self._metadata = time_remaining, metadata
        self._code: int | None = 0
        self._details, self._trailing = "", ()  # type: tuple[str, tuple[tuple[str, Any], ...]]

    def time_remaining(self) -> float | None:
        return self._left

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def code(self) -> int | None:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code.value[0]

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailing: tuple[tuple[str, Any], ...]) -> None:
        self._trailing = tuple(trailing)


class FakeProxyServer:
    """Puts its own calls in the place of every handler, as Serve's server does."""

    def __init__(self, call: Callable[[bytes, Any], Any]) -> None:
        self._call = call
        self._handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        (added,) = handlers
        self._handlers.append(added)
        added._method_handlers = {
            name: handler._replace(unary_unary=self._call, unary_stream=self._call)
            for name, handler in added._method_handlers.items()
        }

    def find(self, method: str, service: str = DENOISER.full_name) -> Any:
        found = [handler.service(SimpleNamespace(method=f"/{service}/{method}")) for handler in self._handlers]
        (handler,) = [handler for handler in found if handler is not None]
        return handler


async def test_a_deadline_travels_on_as_metadata_and_cannot_be_forged() -> None:
    seen: list[Mapping[str, str]] = []

    async def call(_message: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata()))
        assert context.peer() == "ipv4:127.0.0.1:1"
        return b"answer"

    server = FakeProxyServer(call)
    proxy.add_denoiser(object(), server)
    denoise = server.find("Denoise").unary_unary
    assert await denoise(b"", FakeProxyContext(1.5, (("a", "b"), (proxy.SECONDS_LEFT, "99")))) == b"answer"
    assert await denoise(b"", FakeProxyContext(None, ((proxy.SECONDS_LEFT, "99"),))) == b"answer"
    assert seen == [{"a": "b", proxy.SECONDS_LEFT: "1.500000"}, {}]
    assert server.find("DenoiseStream").response_streaming
    assert not server.find("GetModel").response_streaming
    assert await server.find("ModelInfer", INFERENCE.full_name).unary_unary(b"", FakeProxyContext(2)) == b"answer"
    assert seen[2:] == [{proxy.SECONDS_LEFT: "2.000000"}]


async def test_an_empty_message_stays_at_the_proxy() -> None:
    async def call(_message: bytes, _context: Any) -> AsyncIterator[bytes]:
        for event in (b"pass", b""):
            yield event

    server = FakeProxyServer(call)
    proxy.add_denoiser(object(), server)
    stream = server.find("DenoiseStream").unary_stream
    assert [event async for event in stream(b"", FakeProxyContext())] == [b"pass"]


async def test_leaving_a_stream_cancels_the_call_where_it_waits() -> None:
    ended: list[type[BaseException]] = []

    async def call(_message: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"pass"
            await asyncio.Event().wait()
        except BaseException as error:
            ended.append(type(error))
            raise

    stream = proxy.stream(call)(b"", FakeProxyContext())
    assert await anext(stream) == b"pass"
    await asyncio.sleep(0)
    await stream.aclose()  # type: ignore[attr-defined]
    assert ended == [asyncio.CancelledError], "not GeneratorExit, which Serve swallows"


@pytest.mark.parametrize(
    ("code", "details", "becomes", "message"),
    [
        (grpc.StatusCode.INTERNAL, str(ActorDiedError()), grpc.StatusCode.UNAVAILABLE, proxy.LOST.message),
        (grpc.StatusCode.INTERNAL, "Traceback: a bug", grpc.StatusCode.INTERNAL, proxy.BROKEN.message),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "queued", grpc.StatusCode.RESOURCE_EXHAUSTED, proxy.FULL.message),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", grpc.StatusCode.DEADLINE_EXCEEDED, "late"),
    ],
)
async def test_serves_own_statuses_are_said_in_ours(
    code: grpc.StatusCode, details: str, becomes: grpc.StatusCode, message: str
) -> None:
    async def call(_message: bytes, context: Any) -> bytes:
        context.set_code(code)
        context.set_details(details)
        return b""

    context = FakeProxyContext()
    await proxy.unary(call)(b"", context)
    assert (context.code(), context.details()) == (becomes.value[0], message)


async def test_a_replicas_own_errors_pass_as_they_are() -> None:
    status = status_of(proxy.BROKEN)

    async def call(_message: bytes, context: Any) -> bytes:
        context.set_code(status.code)
        context.set_details("in its own words")
        context.set_trailing_metadata(status.trailing_metadata)
        return b""

    context = FakeProxyContext()
    await proxy.unary(call)(b"", context)
    assert context.details() == "in its own words"
    found = Status.FromString(dict(context.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    assert found.details[0].Unpack(info)
    assert not found.details[0].Is(BadRequest.DESCRIPTOR)
    assert info.reason == "INTERNAL"


@pytest.mark.parametrize(
    ("status", "content_type", "becomes"),
    [
        (408, b"text/plain", 504),
        (429, b"text/plain", 429),
        (503, b"text/plain", 503),
        (None, b"", 503),
        (200, b"text/plain", 200),
    ],
)
async def test_what_serve_says_over_http_becomes_a_problem(
    status: int | None, content_type: bytes, becomes: int
) -> None:
    async def serve(_scope: Any, _receive: Any, send: Any) -> None:
        if status is not None:
            head = {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}
            await send(head)
            await send({"type": "http.response.body", "body": b"Request dropped"})

    (middleware,) = proxy.middlewares()
    transport = httpx.ASGITransport(middleware.cls(serve))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://rdt") as client:
        answer = await client.post("/denoise", headers={"x-request-id": "mine"})
    assert answer.status_code == becomes
    if becomes == 200:
        assert answer.text == "Request dropped"
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers.get("retry-after") == (None if becomes == 504 else "1")
        assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine"


async def test_the_proxys_request_id_is_named_once(service: Service) -> None:
    service.app.add_middleware(Edge)
    async with service.client() as client:
        behind = await client.get("/health/live", headers={"x-request-id": "of-the-proxy"})
        alone = await client.get("/health/live")
    assert "x-request-id" not in behind.headers
    assert len(alone.headers.get_list("x-request-id")) == 1


def test_proxies_do_without_the_model() -> None:
    """Serve runs one on every machine, whether or not there is a replica."""
    script = "import sys, service.ray_serve.proxy; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", "rdt_core", "tokenizers", "fastapi"}
