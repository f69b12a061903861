"""How requests arrive on a real socket: in pieces, too slowly, too long, with offers to speak another protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from http import HTTPStatus

import pytest

from service.rest import protocol
from service.rest.errors import TITLE
from service.runtime import FrontEnd
from tests.fakes import Service
from tests.service.sockets import everything, statuses

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
    body_in_two = await answers(port, sent[: cut + 40], sent[cut + 40 :] + sent, n=2)
    for status, body in (*whole, *body_later, *head_in_two, *body_in_two):
        assert status == b"HTTP/1.1 200 OK"
        assert json.loads(body)["text"] == "the fox\r\nUpgrade: not a header"


async def test_requests_in_a_row_wait_as_bytes(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one piece: two are known of at a time, and all are answered in their order."""
    waiting: list[int] = []
    begun = protocol.Http.on_headers_complete

    def noted(self: protocol.Http) -> None:
        begun(self)
        waiting.append(len(self.pipeline))

    monkeypatch.setattr(protocol.Http, "on_headers_complete", noted)
    paths = [b"/health/live", b"/none", b"/health/ready"] * 100
    gets = b"".join(b"GET %s HTTP/1.1\r\nHost: rdt\r\n\r\n" % path for path in paths)
    found = await answers(port, gets, request(b"") * 3, n=len(paths) + 3)
    assert [int(status.split()[1]) for status, _ in found] == [200, 404, 200] * 100 + [200] * 3
    assert all(json.loads(body)["text"].startswith("the fox") for _, body in found[-3:])
    assert max(waiting) == 1


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


async def last_words(port: int, *pieces: bytes, code: str | None = None) -> tuple[int, str]:
    """What the server says before it hangs up, as status and detail: (0, "") if it hangs up in silence.

    `code` is that of the error, None for one of HTTP alone.
    """
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
    phrase = HTTPStatus(problem["status"]).phrase
    assert head.startswith(b"HTTP/1.1 %d %s\r\n" % (problem["status"], phrase.encode()))
    kind = "about:blank" if code is None else f"urn:rdt:problem:{code}"
    assert (problem["type"], problem["title"]) == (kind, phrase if code is None else TITLE[code])  # type: ignore[index]
    assert (b"\r\nRetry-After: 1" in head) == (code == "unavailable")
    assert re.fullmatch("[0-9a-f]{32}", problem["request_id"])
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
    short = b"x:\r\n" * 97  # and three of its own
    assert [status for status, _ in await answers(port, request(short), n=1)] == [b"HTTP/1.1 200 OK"]
    assert await last_words(port, request(short + b"x:\r\n")) == (431, "there are more than 100 headers")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n", b"\x16\x03\x01\x02\0\x01",  # as of a gRPC client; TLS
    ],
)  # fmt: skip
async def test_what_is_not_http_is_a_problem_like_others(port: int, sent: bytes) -> None:
    assert await last_words(port, sent) == (400, "Invalid HTTP request received.")


@pytest.mark.parametrize("n_bytes", [30, len(request(b"")) - 1])
async def test_at_shutdown_a_request_that_is_still_arriving_is_told_so(
    server: tuple[FrontEnd, int], n_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    front, port = server
    telling = asyncio.create_task(last_words(port, request(b"")[:n_bytes], code="unavailable"))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        await front.close()
    assert await telling == (503, "the server is shutting down and takes no new work")
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("waits", [False, True], ids=["idle", "waiting for an answer"])
async def test_at_shutdown_a_connection_ends_with_its_answer(
    server: tuple[FrontEnd, int], service: Service, waits: bool
) -> None:
    front, port = server
    service.engine.held = held = asyncio.Event()
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b""))
        await service.until_live(1)
        if not waits:
            held.set()
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        closing = asyncio.create_task(front.close())
        await asyncio.sleep(0.2 * waits)  # the end is looked for ten times a second
        held.set()
        assert waits == (statuses(await reader.read()) == [200])
        await closing
    writer.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("sent", "status"), [(request(b"")[:-1], 408), (b"GET", 408), (b"\x16\x03", 400)])
async def test_a_shutdown_while_somebody_reads_why_changes_nothing(
    server: tuple[FrontEnd, int], sent: bytes, status: int
) -> None:
    front, port = server
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(5):
        said = await reader.read()  # and the connection is open on this side
        await front.close()
    writer.close()
    assert statuses(said) == [status]


async def test_an_idle_connection_is_kept_longer_than_proxies_keep_theirs(server: tuple[FrontEnd, int]) -> None:
    front, port = server
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: rdt\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    (connection,) = front._server.server_state.connections
    assert isinstance(connection, protocol.Http)
    assert connection.timeout_keep_alive_task is not None
    assert connection.timeout_keep_alive_task.when() - asyncio.get_running_loop().time() > 65
    writer.close()


CHUNKED = b"POST /denoise HTTP/1.1\r\nHost: rdt\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("offer", [b"", OFFERS[0]])
async def test_a_request_may_arrive_cut_anywhere(port: int, offer: bytes) -> None:
    sent = request(offer)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for cut in range(1, len(sent)):
        writer.write(sent[:cut])
        await asyncio.sleep(0.001)
        writer.write(sent[cut:] + b"\r\n")  # some callers send one line too many
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n"), cut
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
    writer.close()


async def test_a_body_is_never_a_second_request(port: int) -> None:
    """However its lines read, and wherever the head before it is cut."""
    inner = b"\r\nupgrade: x" * 3 + b"GET /health/live HTTP/1.1\r\nHost: rdt\r\n\r\n"
    body = b"{}" + inner
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    head = b"POST /denoise HTTP/1.1\r\nHost: rdt\r\n" + kind
    whole, cuts = head + body, range(len(head) - 5, len(head) + 3)
    said = await asyncio.gather(*(everything(port, whole[:cut], whole[cut:]) for cut in cuts))
    assert [statuses(one) for one in said] == [[400]] * len(cuts)


async def test_a_body_in_chunks_is_read_and_is_the_last_of_its_connection(port: int) -> None:
    for pieces in ([CHUNKED + CHUNKS + b"\r\n" + request(b"")], [CHUNKED, CHUNKS, b"\r\n", request(b"")]):
        said = await everything(port, *pieces)
        assert statuses(said) == [200]
        assert b"connection: close" in said
        assert b"the fox" in said


async def test_a_body_in_chunks_that_was_refused_early_is_heard_to_its_end(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED.replace(b"application/json", b"text/plain"))
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 415 ")
        assert b"connection: close" not in head
        writer.write(CHUNKS)
        await asyncio.sleep(0.05)
        assert not reader.at_eof()
        writer.write(b"\r\n")
        await reader.read()
        assert reader.at_eof()
    writer.close()


async def test_trailers_are_no_headers_and_have_their_limit(port: int) -> None:
    said = await everything(port, CHUNKED + CHUNKS + b"X-Request-Id: from-the-trailer\r\n\r\n")
    assert statuses(said) == [200]
    assert b"from-the-trailer" not in said
    assert statuses(await everything(port, CHUNKED, CHUNKS, b"a: b\r\n" * 101, b"\r\n")) == [431]
    one = b"a: " + b"b" * 10_000
    assert statuses(await everything(port, CHUNKED, CHUNKS, one, *[b"b" * 10_000] * 8)) == [431]


@pytest.mark.usefixtures("impatient")
async def test_blank_lines_are_no_request(port: int) -> None:
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = asyncio.create_task(reader.read())
    while not answered.done() and time.monotonic() - began < 5:
        writer.write(b"\r\n")
        await asyncio.sleep(0.01)
    assert answered.done(), "the connection is closed"
    with contextlib.suppress(ConnectionError):  # with lines still on their way it is reset
        assert await answered == b""
    writer.close()


async def test_the_time_runs_from_the_first_byte_of_each_request(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_SECONDS", 0.2)
    one = request(b"")
    pieces = [one + one[:10], *[one[10:] + one[:10]] * 6, one[10:]]  # each ends in the next one
    assert statuses(await everything(port, *pieces, seconds=0.06)) == [200] * 8
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.15)
    writer.write(one[:30])
    await asyncio.sleep(0.15)
    writer.write(one[30:])
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT x:80 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://h:99999999/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: rdt\r\nhost: rdt\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
)
async def test_requests_that_no_route_can_have_are_refused_and_nothing_breaks(
    port: int, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert statuses(await everything(port, sent)) == [400]
    assert statuses(await everything(port, request(b"") + sent)) == [200]  # what was asked before it is answered
    assert statuses(await everything(port, request(b""), sent)) == [200, 400]
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(("version", "n_hosts", "refused"), [("1.1", 0, True), ("1.1", 2, True), ("1.0", 0, False)])
async def test_a_request_says_for_whom_it_is(port: int, version: str, n_hosts: int, refused: bool) -> None:
    said = await everything(port, f"GET /health/live HTTP/{version}\r\n".encode() + b"Host: a\r\n" * n_hosts + b"\r\n")
    assert statuses(said) == [400 if refused else 200]
    assert (b"want one header Host" in said) == refused


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"gzip"])
async def test_no_coding_but_chunks_is_read(port: int, service: Service, coding: bytes) -> None:
    said = await everything(port, CHUNKED.replace(b"chunked", coding) + CHUNKS + b"\r\n" + request(b""))
    assert statuses(said) == [400], "and nothing behind it is read"
    named = coding.replace(b"\r\nTransfer-Encoding:", b",")
    assert b'"the transfer coding is %s: want chunked or none"' % named in said
    assert service.engine.jobs == []


async def test_chunks_in_any_letter_case(port: int) -> None:
    assert statuses(await everything(port, CHUNKED.replace(b"chunked", b"Chunked") + CHUNKS + b"\r\n")) == [200]


@pytest.mark.parametrize("behind", [b"", request(b"")[:-9], request(b""), request(b"") * 9, CHUNKED + CHUNKS])
@pytest.mark.parametrize("later", [False, True])
async def test_who_hangs_up_with_a_request_behind_the_first_frees_the_engine(
    port: int, service: Service, behind: bytes, later: bool
) -> None:
    service.engine.held = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(b"") + (b"" if later else behind))
    await service.until_live(1)
    if later:
        writer.write(behind)
        await asyncio.sleep(0.01)
    writer.close()
    await service.until_live(0)
    assert service.engine.n_left == 1
