"""How requests arrive on a real socket: in pieces, too slowly, too long, with offers to speak another protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from rdt_core import ModelConfig, Tokenizer
from service.rest import protocol
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
def service(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> Service:
    return Service(tiny_tokenizer, tiny_config).open()


@pytest.fixture
async def server(service: Service) -> AsyncIterator[tuple[FrontEnd, int]]:
    async def no_reload() -> None:
        raise AssertionError

    settings = Settings(http_port=0, grpc_port=0)
    front = FrontEnd(settings, service.lifecycle, service.metrics, NO_TRACER, no_reload)  # type: ignore[arg-type]
    with listen(settings.host, 0) as listener:
        await front.open(listener)
        yield front, listener.getsockname()[1]
        await front.close()


@pytest.fixture
def port(server: tuple[FrontEnd, int]) -> int:
    return server[1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_SECONDS", 0.05)


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


@pytest.mark.parametrize(("path", "status"), [("/health/ready", 200), ("/", 200), ("/denoise", 405), ("/none", 404)])
async def test_head_is_get_without_a_body(port: int, path: str, status: int) -> None:
    asked = f"{path} HTTP/1.1\r\nHost: rdt\r\nConnection: close\r\n\r\n".encode()
    heads = []
    for method in (b"HEAD ", b"GET "):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(method + asked)
        head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        writer.close()
        assert bool(body) == (method == b"GET ")
        heads.append(head.split(b"\r\n")[0])
    assert heads[0] == heads[1]
    assert heads[0].startswith(b"HTTP/1.1 %d " % status)


async def last_words(port: int, *pieces: bytes) -> tuple[int, str]:
    """What the server says before it hangs up, as status and detail: (0, "") if it hangs up in silence."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        said = await reader.read()
        writer.close()
    if not said:
        return 0, ""
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json" in head
    assert b"\r\nConnection: close" in head
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d %s\r\n" % (problem["status"], problem["title"].encode()))
    return problem["status"], problem["detail"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("n_bytes", [1, 30, len(request(b"")) - 1])
async def test_a_request_that_does_not_arrive_is_given_up(port: int, service: Service, n_bytes: int) -> None:
    late = 408, "the request has not arrived within 0.05 s"
    assert await last_words(port, request(b"")[:n_bytes]) == late
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(b"") + request(b"")[:n_bytes])  # nor is the second on a connection
    said = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"HTTP/1.1 408 Request Timeout\r\n" in said
    if b"\r\n\r\n" in request(b"")[:n_bytes]:
        assert service.sample("rdt_requests_total", transport="rest", outcome="cancelled") == 2


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    assert await last_words(port) == (0, "")


@pytest.mark.usefixtures("impatient")
async def test_an_answer_may_take_longer_than_its_request(port: int, service: Service) -> None:
    service.engine.held = asyncio.Event()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(b"") + request(b"")[:40])
    await asyncio.sleep(0.2)
    service.engine.held.set()
    said = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"HTTP/1.1 408 Request Timeout\r\n" in said  # the one that was begun


async def test_a_head_without_end_is_refused(port: int) -> None:
    many = (b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(66))
    status, detail = await last_words(port, b"GET / HTTP/1.1\r\n", *many)
    assert (status, detail) == (431, "the headers are longer than 65536 bytes")
    long = b"x: " + b"y" * 65_000 + b"\r\n"
    assert [status for status, _ in await answers(port, request(long), request(long), n=2)] == [b"HTTP/1.1 200 OK"] * 2


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"]
)
async def test_what_is_not_http_is_a_problem_like_others(port: int, sent: bytes) -> None:
    assert await last_words(port, sent) == (400, "Invalid HTTP request received.")


@pytest.mark.parametrize("n_bytes", [30, len(request(b"")) - 1])
async def test_at_shutdown_a_request_that_is_still_arriving_is_told_so(
    server: tuple[FrontEnd, int], n_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    front, port = server
    telling = asyncio.create_task(last_words(port, request(b"")[:n_bytes]))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        await front.close()
    assert await telling == (503, "the server is shutting down and takes no new work")
    assert [record for record in caplog.records if record.exc_info] == []
