"""Answers that come before all of their request has arrived: whoever sends on still gets to read them."""

from __future__ import annotations

import asyncio
import struct
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import SO_LINGER, SOL_SOCKET

import pytest

from service.process import garbage
from service.runtime import FrontEnd
from tests.fakes import Service
from tests.service.sockets import everything, statuses

N_BYTES, MAX_BODY_BYTES = 400_000, 1_048_576
PIECE = b"x" * 20_000


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield reader, writer
        writer.close()


def head(*lines: bytes, n_bytes: int = N_BYTES) -> bytes:
    return b"\r\n".join((b"POST /denoise HTTP/1.1", b"Host: rdt", b"Content-Length: %d" % n_bytes, *lines, b"", b""))


async def sent_before_reading(port: int, *lines: bytes, n_bytes: int = N_BYTES) -> bytes:
    """What there is to read for a caller who sends everything, and only then looks for an answer."""
    async with connected(port) as (reader, writer):
        writer.write(head(*lines, n_bytes=n_bytes))
        await send_body(writer, n_bytes)
        return await reader.read()


async def send_body(writer: asyncio.StreamWriter, n_bytes: int) -> None:
    for _ in range(n_bytes // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("kind", "n_bytes", "status"), [(b"text/plain", N_BYTES, 415), (b"application/json", 2 * MAX_BODY_BYTES, 413)]
)
async def test_who_wants_the_connection_closed(
    port: int, service: Service, kind: bytes, n_bytes: int, status: int
) -> None:
    n_bytes -= n_bytes % len(PIECE)
    said = await sent_before_reading(port, b"Content-Type: " + kind, b"Connection: close", n_bytes=n_bytes)
    assert statuses(said) == [status]
    assert service.engine.jobs == []


async def test_while_the_server_drains(server: tuple[FrontEnd, int], service: Service) -> None:
    await service.lifecycle.drain(0)
    said = await sent_before_reading(server[1], b"Content-Type: application/json")
    assert statuses(said) == [503]
    assert b"connection: close" in said.lower()


async def test_nothing_behind_such_a_request_is_read(port: int, service: Service) -> None:
    async with connected(port) as (reader, writer):
        writer.write(head(b"Content-Type: text/plain", b"Connection: close") + b"x" * (N_BYTES - 1))
        first = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"x" + head(b"Content-Type: application/json", n_bytes=13) + b'{"text": "a"}')
        said = first + await reader.read()
    assert statuses(said) == [415]
    assert service.sample("rdt_requests_total", transport="rest", outcome="cancelled") == 0


async def test_once_all_of_it_has_arrived_the_connection_is_idle(
    server: tuple[FrontEnd, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept for the next request, and not for ever."""
    front, port = server
    monkeypatch.setattr(front._server.config, "timeout_keep_alive", 0.5)
    async with connected(port) as (reader, writer):
        writer.write(head(b"Content-Type: text/plain", n_bytes=9))
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [415]
        writer.write(b"x" * 9)
        await asyncio.sleep(0.05)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: rdt\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in await reader.readuntil(b"OK\r\n")
        writer.write(head(b"Content-Type: text/plain", n_bytes=9))
        await reader.readuntil(b" 415 ")
        writer.write(b"x" * 9)
        async with asyncio.timeout(3):
            await reader.read()


async def test_who_sends_no_more_is_given_up(server: tuple[FrontEnd, int]) -> None:
    """Also by a server that ends: it waits for a moment only."""
    front, port = server
    async with connected(port) as (reader, writer):
        writer.write(head(b"Content-Type: text/plain", b"Connection: close"))
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [415]
        async with asyncio.timeout(5):
            await front.close()
        assert b"HTTP/1.1" not in await reader.read(), "it has been answered"


async def test_a_long_refused_request_gets_to_read_why(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for n_bytes in (200_000, 1_000_000):
        said = await everything(port, b"GET / HTTP/1.1\r\nx: " + b"y" * n_bytes + b"\r\n\r\n")
        assert statuses(said) == [431]
        assert b"the headers are longer than 65536 bytes" in said
    assert caplog.messages == [], "what comes after it is not looked at"


async def test_after_a_refusal_the_end_comes_before_the_connection_is_given_up(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.rest.protocol.PARTING_SECONDS", 60.0)
    async with connected(port) as (reader, writer):
        writer.write(b"\x16\x03\x01 no HTTP")
        assert statuses(await reader.read()) == [400]


async def test_the_answer_before_a_refusal_is_the_last(port: int, service: Service) -> None:
    service.engine.held = asyncio.Event()
    async with connected(port) as (reader, writer):
        writer.write(head(b"Content-Type: application/json", n_bytes=13) + b'{"text": "a"}')
        await service.until_live(1)
        writer.write(b"\x16\x03\x01 no HTTP")
        await asyncio.sleep(0.01)
        service.engine.held.set()
        said = await asyncio.wait_for(reader.read(), 2)  # an idle connection would stay for longer
    assert statuses(said) == [200]


async def test_what_a_connection_held_is_freed_with_it(server: tuple[FrontEnd, int], service: Service) -> None:
    """Not only when the garbage collector comes by, some hundreds of connections later."""
    front, port = server
    service.engine.held = asyncio.Event()
    with garbage.left_alone():
        async with connected(port) as (_, writer):
            writer.write(head(b"Content-Type: application/json", n_bytes=13) + b'{"text": "a"}')
            writer.write(head(b"Content-Type: application/json", n_bytes=4000) + b"x" * 3000)
            await service.until_live(1)
            (connection,) = map(weakref.ref, front._server.server_state.connections)
        async with asyncio.timeout(5):
            while connection() is not None:
                await asyncio.sleep(0.01)


async def test_who_breaks_off_is_forgotten(port: int, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(port) as (reader, writer):
        writer.write(head(b"Content-Type: text/plain", b"Connection: close"))
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [415]
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.sleep(0.05)
    assert caplog.messages == []


@pytest.mark.parametrize("coding", [b"chunk\xe9d", b"\xa0chunked", b"\xff"])
async def test_a_coding_that_is_not_ascii(port: int, coding: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(port) as (reader, writer):
        writer.write(b"POST /denoise HTTP/1.1\r\nHost: rdt\r\nTransfer-Encoding: " + coding + b"\r\n\r\n")
        said = await reader.read()
    assert statuses(said) == [400]
    assert b"\\\\x" in said, "shown as an escape"
    assert caplog.messages == []
