"""How the message of a gRPC call arrives: slowly, not at all, or as no message; and answers that nobody reads."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections import Counter
from contextlib import suppress

import grpc
import pytest

from rdt_core import ModelConfig, Tokenizer
from service import limits
from service.rpc import arrival, server
from service.rpc.convert import SERVICE
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from service.rpc.server import RpcServer
from tests.fakes import MAX_BODY_BYTES, Service
from tests.service.sockets import frame, header

KEY = "s3cret"
TEXT = pb.DenoiseRequest(text="a")


@pytest.mark.parametrize("method", [f"{SERVICE}/Denoise", f"{SERVICE}/DenoiseStream", "grpc.health.v1.Health/Check"])
async def test_a_call_whose_message_never_comes_ends(
    channel: grpc.aio.Channel, service: Service, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(arrival, "ARRIVAL_SECONDS", 0.1)
    call = channel.stream_stream(f"/{method}")()
    async with asyncio.timeout(5):
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call.details() == "the message took too long to arrive"
    assert service.sample("rdt_refused_total", reason="bodies") == (SERVICE in method), "health is no request"


async def test_of_too_many_slow_messages_the_slowest_is_given_up(
    channel: grpc.aio.Channel, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(arrival, "MOST_SLOW", 3)
    message = TEXT.SerializeToString()
    slow = [channel.stream_unary(f"/{SERVICE}/Denoise")() for _ in range(5)]
    async with asyncio.timeout(5):
        codes = [asyncio.ensure_future(call.code()) for call in slow]
        while sum(code.done() for code in codes) < 2:
            await asyncio.sleep(0.01)
        assert (await DenoiserStub(channel).Denoise(TEXT)).steps == 2, "a fast one is taken"
        await asyncio.sleep(0.05)
        assert sum(code.done() for code in codes) == 2
        for call, code in zip(slow, codes, strict=True):
            if not code.done():
                await call.write(message)
        assert Counter(await asyncio.gather(*codes)) == {
            grpc.StatusCode.OK: 3, grpc.StatusCode.RESOURCE_EXHAUSTED: 2
        }  # fmt: skip
    assert service.sample("rdt_refused_total", reason="bodies") == 2


async def test_slow_messages_that_have_come_are_slow_no_more(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arrival, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(arrival, "MOST_SLOW", 1)
    for _ in range(3):
        call = channel.stream_unary(f"/{SERVICE}/Denoise")()
        await asyncio.sleep(0.05)
        await call.write(TEXT.SerializeToString())
        assert await call.code() is grpc.StatusCode.OK
    assert caplog.messages == []


async def test_a_slow_message_whose_time_is_just_over_is_given_up_once(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arrival, "MOST_SLOW", 0)
    arrivals = arrival.Arrivals(service.metrics, MAX_BODY_BYTES)
    with suppress(TimeoutError):
        async with asyncio.timeout(0) as limit:
            asyncio.get_running_loop().call_soon(arrivals._note_slow, limit)
            await asyncio.sleep(5)
    assert limit.expired()
    assert caplog.messages == []


async def test_the_messages_of_all_calls_have_a_bound_together(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch keeps all of its message while one of its items waits. A message of a few bytes is taken all the same."""
    monkeypatch.setattr(limits, "MOST_BODIES", 3)
    monkeypatch.setattr(limits, "FEW_BYTES", 100)
    service.engine.held = asyncio.Event()
    batch = pb.DenoiseBatchRequest(items=[TEXT, pb.DenoiseRequest(text="a" * (MAX_BODY_BYTES - 100))])
    async with service.channel() as channel, asyncio.timeout(10):
        stub = DenoiserStub(channel)
        taken = [stub.DenoiseBatch(batch) for _ in range(3)]
        await service.until_live(3)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.DenoiseBatch(batch)
        small = stub.Denoise(TEXT)
        await service.until_live(4)
        service.engine.held.set()
        assert (await small).steps == 2
        for call in (*taken, stub.DenoiseBatch(batch)):  # there is room again
            assert len((await call).results) == 2
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    together = f"the messages of all calls under way have over {3 * MAX_BODY_BYTES} bytes: try again later"
    assert refused.value.details() == together
    assert service.sample("rdt_refused_total", reason="bodies") == 1


@pytest.mark.parametrize("timeout", [None, 0.1])
async def test_a_caller_who_leaves_before_the_message_has_come(
    channel: grpc.aio.Channel, service: Service, timeout: float | None
) -> None:
    call = channel.stream_unary(f"/{SERVICE}/Denoise")(timeout=timeout)
    if timeout is None:
        await asyncio.sleep(0.1)
        call.cancel()
    async with asyncio.timeout(5):
        while not service.sample("rdt_requests_total", transport="grpc", outcome="cancelled"):
            await asyncio.sleep(0.01)
    await asyncio.sleep(2 * arrival.LEAVING_SECONDS)
    assert service.sample("rdt_requests_total", transport="grpc", outcome="malformed") == 0


async def test_a_call_without_a_message(channel: grpc.aio.Channel, service: Service) -> None:
    call = channel.stream_unary(f"/{SERVICE}/Denoise")()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == "the call has no message"
    assert service.sample("rdt_requests_total", transport="grpc", outcome="malformed") == 1


async def test_whoever_has_no_key_is_refused_before_the_message_comes(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    async with Service(tiny_tokenizer, tiny_config, api_key=KEY).open().channel() as channel:
        call = channel.stream_unary(f"/{SERVICE}/Denoise")()
        async with asyncio.timeout(5):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
async def test_bytes_that_are_no_message_to_health_are_no_fault_of_ours(
    channel: grpc.aio.Channel, service: Service, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    call = channel.stream_stream(f"/grpc.health.v1.Health/{method}")()
    await call.write(b"\xff")
    await call.done_writing()
    async with asyncio.timeout(5):
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == "the message cannot be read"
    for outcome in ("internal", "malformed"):
        assert service.sample("rdt_requests_total", transport="grpc", outcome=outcome) == 0
    assert caplog.messages == []


def opened_without_a_window() -> bytes:
    """The start of a connection whose client takes no data."""
    initial_window_size = struct.pack(">HI", 4, 0)
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, initial_window_size)


def begun(stream: int, **more: str) -> bytes:
    """A call before its message has come."""
    headers = {
        ":method": "POST", ":scheme": "http", ":path": f"/{SERVICE}/Denoise", ":authority": "x",
        "content-type": "application/grpc", "te": "trailers", **more,
    }  # fmt: skip
    block = b"".join(header(name.encode(), value.encode()) for name, value in headers.items())
    return frame(1, 4, stream, block)


def called(stream: int, message: bytes) -> bytes:
    return begun(stream) + frame(0, 1, stream, b"\0" + struct.pack(">I", len(message)) + message)


async def test_answers_that_nobody_reads_do_not_stay_for_ever(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTION_MINUTES", 0.2 / 60)
    monkeypatch.setattr(server, "PARTING_MINUTES", 0.2 / 60)
    own = RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES)
    await own.start("127.0.0.1", 0)
    others = asyncio.all_tasks()
    reader, writer = await asyncio.open_connection("127.0.0.1", own.port)
    writer.write(opened_without_a_window() + called(1, TEXT.SerializeToString()))
    async with asyncio.timeout(10):
        while service.sample("rdt_requests_total", transport="grpc", outcome="ok") < 1:
            await asyncio.sleep(0.01)
        while await reader.read(65_536):
            pass
        while len(asyncio.all_tasks() - others) > 1:  # one is gRPC's own, which waits for the next call
            await asyncio.sleep(0.01)
    writer.close()
    await own.stop(0)


async def test_who_waits_may_ask_whether_the_connection_still_stands(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PING_SECONDS", 0.04)
    own = RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES)
    await own.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", own.port)
    writer.write(opened_without_a_window() + begun(1))
    async with asyncio.timeout(5):
        for _ in range(6):
            await asyncio.sleep(0.05)
            writer.write(frame(6, 0, 0, b"question"))
            await reader.readuntil(frame(6, 1, 0, b"question"))
    writer.close()
    await own.stop(0)


async def test_no_call_with_less_metadata_than_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    """gRPC by itself refuses from 8 KiB on, at random: of calls as long as this nearly all."""
    metadata = (("x-long", "y" * (arrival.METADATA_BYTES - 1000)),)
    for _ in range(10):
        await DenoiserStub(channel).GetModel(pb.GetModelRequest(), metadata=metadata)


async def test_a_call_with_too_much_metadata_does_not_stay_until_its_connection_ends(service: Service) -> None:
    own = RpcServer(service.lifecycle, service.metrics, max_message_bytes=MAX_BODY_BYTES)
    await own.start("127.0.0.1", 0)
    others = asyncio.all_tasks()
    _reader, writer = await asyncio.open_connection("127.0.0.1", own.port)
    metadata = {f"x-{number}": "y" * 100 for number in range(125)}
    writer.write(opened_without_a_window() + b"".join(begun(stream, **metadata) for stream in range(1, 21, 2)))
    async with asyncio.timeout(10):
        while service.sample("rdt_requests_total", transport="grpc", outcome="too_large") < 10:
            await asyncio.sleep(0.01)
        while len(asyncio.all_tasks() - others) > 1:
            await asyncio.sleep(0.01)
    writer.close()
    await own.stop(0)


@pytest.mark.parametrize("fault", ["text", "no message", "no key"])
async def test_nothing_of_a_call_that_failed_waits_for_the_garbage_collector(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, fault: str
) -> None:
    """Hundreds of messages of the largest size would."""
    metadata = [] if fault == "no key" else [("x-api-key", KEY)]

    def n_kept() -> int:
        return sum(type(kept).__name__ == "_ServicerContext" for kept in gc.get_objects())

    async with Service(tiny_tokenizer, tiny_config, api_key=KEY).open().channel() as channel, asyncio.timeout(10):
        gc.collect()
        gc.disable()
        try:
            before = n_kept()
            for _ in range(3):
                call = channel.stream_unary(f"/{SERVICE}/Denoise")(metadata=metadata)
                if fault == "text":
                    await call.write(pb.DenoiseRequest(halting="odd").SerializeToString())
                await call.done_writing()
                assert await call.code() is not grpc.StatusCode.OK
            for _ in range(100):  # and no longer: without the channel's end the server would stay
                if (after := n_kept()) <= before:
                    break
                await asyncio.sleep(0.01)
        finally:
            gc.enable()
    assert after <= before
