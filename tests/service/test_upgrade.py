"""Offers to speak another protocol than HTTP/1.1, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from rdt_core import ModelConfig, Tokenizer
from service.runtime import FrontEnd, listen
from service.settings import Settings
from service.tracing import NO_TRACER
from tests.fakes import Service

BODY = json.dumps({"text": "the [MASK]\r\nUpgrade: not a header"}).encode()
OFFERS = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",  # as Java does
    b"upgrade : h2c\r\nconnection: upgrade\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
)


def request(offer: bytes) -> bytes:
    return (
        b"POST /denoise HTTP/1.1\r\nHost: rdt\r\n" + offer + b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    )


@pytest.fixture
async def port(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> AsyncIterator[int]:
    service = Service(tiny_tokenizer, tiny_config).open()

    async def no_reload() -> None:
        raise AssertionError

    settings = Settings(http_port=0, grpc_port=0)
    front = FrontEnd(settings, service.lifecycle, service.metrics, NO_TRACER, no_reload)  # type: ignore[arg-type]
    with listen(settings.host, 0) as listener:
        await front.open(listener)
        yield listener.getsockname()[1]
        await front.close()


async def answers(port: int, *pieces: bytes, n: int) -> list[tuple[bytes, bytes]]:
    """Status line and body of each, all on one connection."""
    found = []
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        for _ in range(n):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            found.append((head.split(b"\r\n")[0], await reader.readexactly(int(length.split(b":")[1]))))
        writer.close()
    return found


@pytest.mark.parametrize("offer", OFFERS)
async def test_an_offer_that_is_not_taken_changes_nothing(port: int, offer: bytes) -> None:
    sent = request(offer)
    cut = sent.index(b"\r\n\r\n") + 4
    whole = await answers(port, sent, sent, n=2)
    body_later = await answers(port, sent[:cut], sent[cut:], sent, n=2)
    head_in_two = await answers(port, sent[: cut - 20], sent[cut - 20 :], sent, n=2)
    for status, body in (*whole, *body_later, *head_in_two):
        assert status == b"HTTP/1.1 200 OK"
        assert json.loads(body)["text"] == "the fox\r\nUpgrade: not a header"
