"""Callers who read what they are sent late, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket

import pytest

from service.rest import protocol
from service.runtime import FrontEnd

ASKED = b"GET /openapi.json HTTP/1.1\r\nHost: rdt\r\n\r\n"


async def test_who_reads_nothing_is_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile no more answers are made than one or two."""
    held: list[int] = []
    receive = protocol.Http.data_received

    def received(http: protocol.Http, data: bytes) -> None:
        receive(http, data)
        held.append(http.transport.get_write_buffer_size())

    monkeypatch.setattr(protocol.Http, "data_received", received)
    monkeypatch.setattr(protocol, "READING_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", port)) as caller:
        caller.setblocking(False)
        gone = False
        async with asyncio.timeout(10):
            while not gone:
                try:
                    caller.send(ASKED * 50)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    gone = True
                await asyncio.sleep(0.01)
    assert 0 < max(held) < 200_000, "64 KiB, and the answer that was one too many"


async def test_who_reads_late_and_then_goes_on_is_not_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[protocol.Http] = []
    pause = protocol.Http.pause_writing
    monkeypatch.setattr(protocol.Http, "pause_writing", lambda http: (pause(http), paused.append(http)))
    monkeypatch.setattr(protocol, "READING_SECONDS", 0.3)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        n_asked = 0
        while not paused:
            writer.write(ASKED)
            n_asked += 1
            await asyncio.sleep(0.002)
        n_answered = 0
        while n_answered < n_asked:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            assert length is not None
            await reader.readexactly(int(length[1]))
            n_answered += 1
        await asyncio.sleep(0.5)
        writer.write(ASKED)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(protocol, "READING_SECONDS", 0.05)
        paused[0].pause_writing()  # who then reads nothing is left
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_who_leaves_the_last_of_it_unread_is_left(
    server: tuple[FrontEnd, int], monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    """Though it is so little that the server goes on, or has become so little since."""
    front, port = server
    monkeypatch.setattr(front._server.config, "timeout_keep_alive", 0.3)
    monkeypatch.setattr(protocol, "READING_SECONDS", 0.5)
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", port))
        caller.setblocking(False)
        async with asyncio.timeout(10):
            while not (connections := front._server.server_state.connections):
                await asyncio.sleep(0.001)
            (connection,) = connections
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            enough = 65_536 if hangs_up else 0  # beyond the former the server waits with more
            while connection.transport.get_write_buffer_size() <= enough:
                caller.send(ASKED)
                await asyncio.sleep(0.001)
            if hangs_up:
                caller.shutdown(socket.SHUT_WR)
                while not connection.transport.is_closing():
                    await asyncio.sleep(0.001)
            while connection.flow.write_paused:
                with contextlib.suppress(BlockingIOError):
                    caller.recv(4096)
                await asyncio.sleep(0)
            assert connection.transport.get_write_buffer_size() > 0
            while front._server.server_state.connections:
                await asyncio.sleep(0.01)
