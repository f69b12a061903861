"""The gRPC interface beside what the contract covers: health, reflection, the key, deadlines, leaving, bad bytes."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rdt_core import ModelConfig, Tokenizer
from service.rpc import denoise, health, server
from service.rpc.convert import SERVICE, SERVICES
from service.rpc.denoise import DenoiserCalls, cut_at, seconds_left
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from service.rpc.server import RpcServer
from service.settings import INT32_MAX
from tests.fakes import MAX_BODY_BYTES, Service
from tests.service.sockets import frame, header

ROOT = Path(__file__).parents[3]
KEY = "s3cret"
TEXT = pb.DenoiseRequest(text="a")


async def test_no_call_fails_when_its_connection_has_grown_old(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTION_MINUTES", 0.1 / 60)
    service.engine.held = asyncio.Event()
    async with service.channel() as channel:
        stub = DenoiserStub(channel)
        slow = asyncio.ensure_future(stub.Denoise(TEXT))
        await service.until_live(1)
        await asyncio.sleep(0.5)
        service.engine.held.set()
        assert (await slow).steps == 2, "a call under way is not cut off"
        until_then = time.monotonic() + 0.5
        while time.monotonic() < until_then:
            assert (await stub.Denoise(TEXT)).steps == 2


def test_the_checked_in_code_is_what_proto_says(tmp_path: Any) -> None:
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(made) == 5
    assert made == {
        path.name: path.read_text()
        for path in (ROOT / "service" / "rpc" / "pb").glob("*_pb2*.py*")
        if path.suffix != ".pyc"
    }


def test_every_method_is_served(service: Service) -> None:
    handler = DenoiserCalls(service.lifecycle, service.metrics, MAX_BODY_BYTES).handler()
    for method in pb.DESCRIPTOR.services_by_name["Denoiser"].methods:
        found = handler.service(SimpleNamespace(method=f"/{SERVICE}/{method.name}"))  # type: ignore[arg-type]
        assert found is not None
        assert found.response_streaming == method.server_streaming


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x0a\x01\xff", b"\x0a\x7f"])
async def test_bytes_that_are_no_message(service: Service, channel: grpc.aio.Channel, message: bytes) -> None:
    for method in ("Denoise", "DenoiseBatch"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(f"/{SERVICE}/{method}")(message)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert service.sample("rdt_requests_total", transport="grpc", outcome="malformed") == 2


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
async def test_numbers_that_are_not_finite(channel: grpc.aio.Channel, value: float, shown: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text="a", threshold=value, mask_ratio=value))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    for message in (f"threshold is {shown}: want a finite", f"mask_ratio is {shown}: want a number from 0 to 1"):
        assert message in (refused.value.details() or "")


async def test_the_largest_limit_that_settings_allow(service: Service) -> None:
    server = RpcServer(service.lifecycle, service.metrics, max_message_bytes=INT32_MAX)
    await server.start("127.0.0.1", 0)
    await server.stop(0)


async def test_a_message_over_the_limit(service: Service, channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"larger than {MAX_BODY_BYTES} bytes") as error:
        await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text="a" * MAX_BODY_BYTES))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert service.sample("rdt_requests_total", transport="grpc", outcome="too_large") == 1
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await DenoiserStub(channel).Denoise(pb.DenoiseRequest(text="a" * 4 * MAX_BODY_BYTES))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own word for it: not even read


async def test_the_longest_error_reaches_the_caller(channel: grpc.aio.Channel) -> None:
    """Statuses travel as headers, and clients take no more than a few thousand bytes of these."""
    long = "𝄞" * 200
    request = pb.DenoiseRequest(
        text=long + "\0", halting=long, restore=long, max_steps=-1, threshold=-1, top_k=-1, timeout_ms=-1,
        mask_ratio=-1, seed=-1,
    )  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await DenoiserStub(channel).Denoise(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_health_follows_the_lifecycle(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "POLL_SECONDS", 0.02)
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY)  # health needs no key
    async with service.channel() as channel:
        stub = HealthStub(channel)
        watched = stub.Watch(HealthCheckRequest(service=SERVICE))

        async def check(name: str = "") -> int:
            listed = (await stub.List(HealthListRequest())).statuses
            status: int = (await stub.Check(HealthCheckRequest(service=name))).status
            assert set(listed) == {"", *SERVICES}
            assert listed[name].status == status
            return status

        seen = [(await watched.read()).status]
        assert await check() == HealthCheckResponse.NOT_SERVING
        service.open()
        assert await check() == await check(SERVICE) == HealthCheckResponse.SERVING
        seen.append((await watched.read()).status)
        service.engine.ready = False
        assert await check() == HealthCheckResponse.NOT_SERVING
        seen.append((await watched.read()).status)
        service.engine.ready = True
        seen.append((await watched.read()).status)
        await asyncio.sleep(3 * health.POLL_SECONDS)
        await service.lifecycle.drain(0)
        assert await check() == HealthCheckResponse.NOT_SERVING
        while (message := await watched.read()) is not grpc.aio.EOF:
            seen.append(message.status)
        assert seen == [HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVING] * 2 + [
            HealthCheckResponse.NOT_SERVING
        ], "every change once, and the watch has ended"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await check("nobody")
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        unknown = stub.Watch(HealthCheckRequest(service="nobody"))
        assert (await unknown.read()).status == HealthCheckResponse.SERVICE_UNKNOWN


async def test_many_may_watch_and_not_too_many(
    service: Service, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(health, "MOST_WATCHERS", 20)
    stub = HealthStub(channel)
    watching = [stub.Watch(HealthCheckRequest()) for _ in range(20)]
    async with asyncio.timeout(5):
        for watch in watching:
            assert (await watch.read()).status == HealthCheckResponse.SERVING
        looking = [task for task in asyncio.all_tasks() if "_look_for_change" in repr(task)]
        assert len(looking) == 1, "however many watch"
        one_more = stub.Watch(HealthCheckRequest())
        assert await one_more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        service.engine.ready = False
        for watch in watching:
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        watching.pop().cancel()
        again = stub.Watch(HealthCheckRequest())
        assert (await again.read()).status == HealthCheckResponse.NOT_SERVING
        await service.lifecycle.drain(0)
        for watch in (*watching, again):
            assert await watch.read() is grpc.aio.EOF


async def test_a_watch_that_begins_while_the_state_is_another_for_a_moment(
    service: Service, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a broken tick. Others watch already, and their looks see nothing of it."""
    monkeypatch.setattr(health, "POLL_SECONDS", 0.3)
    stub = HealthStub(channel)
    before = stub.Watch(HealthCheckRequest())
    assert (await before.read()).status == HealthCheckResponse.SERVING
    await asyncio.sleep(0.02)  # until it waits
    service.engine.ready = False
    amid = stub.Watch(HealthCheckRequest())
    first = (await amid.read()).status
    await asyncio.sleep(0.02)
    service.engine.ready = True
    second = asyncio.ensure_future(amid.read())
    await asyncio.wait({second}, timeout=5)
    assert (first, second.done()) == (HealthCheckResponse.NOT_SERVING, True)
    assert second.result().status == HealthCheckResponse.SERVING
    await service.lifecycle.drain(0)  # or the end of the test would wait for who looks whether the state changes


async def test_reflection_lists_the_service(service: Service) -> None:
    server = RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES)
    await server.start("127.0.0.1", 0)

    def reflected() -> tuple[set[str], str]:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            return set(database.get_services()), database.FindFileContainingSymbol(SERVICE).name

    services, source = await asyncio.to_thread(reflected)
    await server.stop(0)
    assert services == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert source == "rdt/v1/denoiser.proto"


async def test_reflection_wants_the_key_too(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> None:
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY).open()
    async with service.channel() as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(iter([b""]))
        assert await call.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("metadata", "opens"),
    [
        ([("authorization", f"Bearer {KEY}")], True),
        ([("authorization", f"bearer  {KEY}")], True),
        ([("x-api-key", KEY)], True),
        ([("authorization", "Bearer of-a-proxy"), ("x-api-key", KEY)], True),
        ([("authorization", f"Bearer {KEY}"), ("x-api-key", "wrong")], True),
        ([], False),
        ([("authorization", "Bearer wrong")], False),
        ([("authorization", f"Basic {KEY}")], False),
        ([("x-api-key", KEY + "x")], False),
    ],
)
async def test_the_key(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, metadata: list[tuple[str, str]], opens: bool
) -> None:
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY).open()

    async def code_of(call: Any) -> grpc.StatusCode:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            with suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
        return await call.code()  # type: ignore[no-any-return]

    async with service.channel() as channel:
        stub = DenoiserStub(channel)
        batch = pb.DenoiseBatchRequest(items=[TEXT])
        codes = {
            await code_of(call)
            for call in (
                stub.Denoise(TEXT, metadata=metadata),
                stub.DenoiseStream(TEXT, metadata=metadata),
                stub.DenoiseBatch(batch, metadata=metadata),
                stub.GetModel(pb.GetModelRequest(), metadata=metadata),
            )
        }
    assert codes == {grpc.StatusCode.OK if opens else grpc.StatusCode.UNAUTHENTICATED}
    assert service.sample("rdt_requests_total", transport="grpc", outcome="unauthenticated") == (0 if opens else 4)
    assert len(service.engine.jobs) == (3 if opens else 0)


async def test_the_calls_deadline_is_the_jobs(service: Service, channel: grpc.aio.Channel) -> None:
    stub = DenoiserStub(channel)
    await stub.Denoise(TEXT, timeout=20)
    await stub.Denoise(pb.DenoiseRequest(text="a", timeout_ms=1500), timeout=20)
    await stub.Denoise(pb.DenoiseRequest(text="a", timeout_ms=60_000), timeout=20)
    await stub.DenoiseBatch(pb.DenoiseBatchRequest(items=[TEXT]), timeout=20)
    async for _ in stub.DenoiseStream(TEXT, timeout=20):
        pass
    await stub.Denoise(TEXT)
    *deadlines, none = [job.deadline for job in service.engine.jobs]
    left = [deadline - service.clock.now for deadline in deadlines if deadline is not None]
    assert none is None
    assert left.pop(1) == 1.5
    assert len(left) == 4
    assert all(10 < seconds < 20 for seconds in left), left


@pytest.mark.parametrize(("left", "given"), [(None, None), (1.0, 0.97), (0.04, 0.03), (0.0, 0.0)])
def test_the_margin_is_small(left: float | None, given: float | None) -> None:
    assert seconds_left(SimpleNamespace(time_remaining=lambda: left)) == given  # type: ignore[arg-type]


async def test_a_call_without_an_answer_ends_by_itself_in_the_middle_of_the_margin() -> None:
    now = asyncio.get_running_loop().time()
    ends_at = cut_at(SimpleNamespace(time_remaining=lambda: 100.0))  # type: ignore[arg-type]
    assert ends_at == pytest.approx(now + (98.98 + 100) / 2, abs=0.2)
    assert cut_at(SimpleNamespace(time_remaining=lambda: None)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["Denoise", "DenoiseBatch", "DenoiseStream"])
@pytest.mark.parametrize("ended_by", ["cancel", "deadline"])
async def test_a_caller_who_leaves_frees_the_engine(
    service: Service, channel: grpc.aio.Channel, method: str, ended_by: str
) -> None:
    service.engine.held = asyncio.Event()
    batch = method == "DenoiseBatch"
    request = pb.DenoiseBatchRequest(items=[TEXT] * 3) if batch else TEXT
    n_jobs = 3 if batch else 1
    call = getattr(DenoiserStub(channel), method)(request, timeout=0.5 if ended_by == "deadline" else None)
    await service.until_live(n_jobs)
    if ended_by == "cancel":
        call.cancel()
    await service.until_live(0)
    assert service.engine.n_left == n_jobs
    outcome = "deadline_exceeded" if ended_by == "deadline" else "cancelled"
    async with asyncio.timeout(5):
        while service.sample("rdt_requests_total", transport="grpc", outcome=outcome) != n_jobs:
            await asyncio.sleep(0.005)


async def test_a_batch_whose_time_is_over_has_the_answers_that_are_there(
    service: Service, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoise, "MARGIN_SECONDS", math.inf)  # so that a quarter of the time is left for the way back
    service.engine.held = asyncio.Event()
    items = [TEXT, pb.DenoiseRequest(), TEXT]
    held = asyncio.ensure_future(DenoiserStub(channel).DenoiseBatch(pb.DenoiseBatchRequest(items=items), timeout=2))
    await service.until_live(2)
    service.engine.held = None  # those that come now are answered at once
    answer = await DenoiserStub(channel).DenoiseBatch(pb.DenoiseBatchRequest(items=[TEXT]))
    assert answer.results[0].answer.steps == 2
    results = (await held).results
    assert [result.problem.code for result in results] == ["deadline_exceeded", "invalid_argument", "deadline_exceeded"]


async def test_a_path_that_is_no_text_ends_nobody_elses_service(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends grpcio's own server, which has to come back."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": b"/\xff", b":authority": b"x"}
    fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    block = b"".join(header(name, value) for name, value in fields.items())
    server = RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES)
    await server.start("127.0.0.1", 0)
    for _ in range(2):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 5, 1, block))
        caplog.clear()
        async with asyncio.timeout(5):
            while "the gRPC server has ended by itself" not in caplog.text:
                await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert (await DenoiserStub(channel).Denoise(TEXT, wait_for_ready=True, timeout=10)).steps == 2
        writer.close()  # it need not, for others to be served
    await server.stop(0)


async def test_a_server_that_parts_finishes_what_is_under_way_and_sends_callers_elsewhere(service: Service) -> None:
    """A connection that stood would only be refused call by call, until the last of the others was answered."""
    service.engine.held = asyncio.Event()
    leaving, other = (
        RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES, share_port=True)
        for _ in range(2)
    )
    await leaving.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{leaving.port}") as channel, asyncio.timeout(10):
        stub = DenoiserStub(channel)
        under_way = asyncio.ensure_future(stub.Denoise(TEXT))
        await service.until_live(1)
        await other.start("127.0.0.1", leaving.port)
        leaving.part()
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)  # the caller knows
        other_answers = await stub.GetModel(pb.GetModelRequest(), wait_for_ready=True)
        assert (other_answers.name, under_way.done()) == ("tiny", False)
        service.engine.held.set()
        assert (await under_way).steps == 2
        await leaving.stop(60)  # as soon as nothing is under way
        await other.stop(0)
