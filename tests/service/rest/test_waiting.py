"""Connections between two requests, requests that come slowly, and those that wait behind another."""

from __future__ import annotations

import asyncio

import pytest

from service.rest import protocol
from service.runtime import FrontEnd
from tests.fakes import Service
from tests.service.rest.test_parting import connected, head
from tests.service.sockets import everything, statuses

BODY = b'{"text": "a"}'
HEAD = head(b"Content-Type: application/json", n_bytes=len(BODY))
ONE = HEAD + BODY
LIVE = b"GET /health/live HTTP/1.1\r\nHost: rdt\r\n"


@pytest.mark.parametrize("cut", [0, 20, len(ONE) - 5])
async def test_while_a_request_is_answered_its_connection_is_not_idle(
    server: tuple[FrontEnd, int], service: Service, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Wherever the end of the answer before it has cut it."""
    front, port = server
    monkeypatch.setattr(front._server.config, "timeout_keep_alive", 0.1)
    service.engine.held = asyncio.Event()
    async with connected(port) as (reader, writer):
        writer.write(ONE + ONE[:cut])
        await service.until_live(1)
        service.engine.held.set()
        first = await reader.readuntil(b"}")
        service.engine.held = asyncio.Event()
        writer.write(ONE[cut:])
        await service.until_live(1)
        await asyncio.sleep(0.3)
        service.engine.held.set()
        assert statuses(first + await reader.read()) == [200, 200]


@pytest.mark.parametrize("pieces", [[ONE], [HEAD, BODY]])
async def test_a_connection_that_waits_for_a_request_may_wait_longer_than_one_may_take(
    port: int, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]
) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_SECONDS", 0.1)
    async with connected(port) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        writer.write(LIVE + b"Connection: close\r\n\r\n")
        assert statuses(await reader.read()) == [200, 200]


async def test_a_request_that_comes_in_drops_has_no_longer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_SECONDS", 0.2)
    for sent in (ONE, head(b"Content-Type: application/json", n_bytes=40) + BODY.ljust(40)):
        pieces = [sent[at : at + 1] for at in range(len(sent) - 30, len(sent))]
        assert statuses(await everything(port, sent[:-30], *pieces, seconds=0.02)) == [408]


async def test_of_what_waits_only_so_much_is_taken_in(server: tuple[FrontEnd, int], service: Service) -> None:
    front, port = server
    service.engine.held = asyncio.Event()
    async with connected(port) as (_, writer):
        writer.write(ONE * 200_000)
        await service.until_live(1)
        await asyncio.sleep(0.1)
        (connection,) = front._server.server_state.connections
        assert isinstance(connection, protocol.Http)
        assert 0 < len(connection._unread) < 1_000_000
    service.engine.held.set()  # or the server would wait for its callers' time to read


async def test_the_longest_head(port: int) -> None:
    room = protocol.HEAD_BYTES - len(LIVE) - len(b"x: \r\nConnection: close\r\n\r\n")
    for n_more, status in ((0, 200), (1, 431)):
        sent = LIVE + b"x: " + b"y" * (room + n_more) + b"\r\nConnection: close\r\n\r\n"
        assert statuses(await everything(port, sent)) == [status]


async def test_of_a_long_coding_the_beginning_is_shown(port: int) -> None:
    said = await everything(port, LIVE + b"Transfer-Encoding: " + b"x" * 9000 + b"\r\n\r\n")
    assert b"the transfer coding is " + b"x" * 80 + b": want" in said
