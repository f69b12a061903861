"""HTTP by uvicorn, with limits on how a request arrives. Offers to upgrade to another protocol are ignored.

The head of a request is collected here and handed to the parser whole. A body is passed on as it arrives.
"""

from __future__ import annotations

import asyncio
import logging
import re
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service import calls
from service.errors import DRAINING, RETRY_SECONDS, Unavailable
from service.rest.errors import STATUS, problem_of
from service.rest.problem import PROBLEM_JSON, Problem

log = logging.getLogger(__name__)

HEAD_BYTES = 65_536
"""Of a request line and its headers, and of the trailers of a body in chunks. Nothing else bounds them."""
ARRIVAL_SECONDS = 30.0
"""Until a request has arrived, head and body, from its first byte on; and until the first byte of a connection."""
READING_SECONDS = 30.0
"""How long a caller may leave everything unread that is sent to it."""
PARTING_SECONDS = 1.0
"""For a caller to read an answer to what it has not finished sending: to close at once might take it away."""
HEAD_END = re.compile(rb"\n\r?\n")
UPGRADE = re.compile(rb"\nupgrade[ \t]*:", re.IGNORECASE)
NO_HTTP = "Invalid HTTP request received."
NOT_ONE_HOST = "the request does not say for whom it is: want one header Host"


class Unfit(ValueError):
    """Why a head is refused that the parser would let pass."""


class Http(HttpToolsProtocol):
    """What arrives too slowly or with too long a head is answered with an error, and so is what is still arriving when
    the server shuts down; then the connection is closed.

    A request that offers an upgrade is answered as if it did not, which is what HTTP asks of who takes none.
    Java's own client offers HTTP/2 with every request, and so does `curl --http2`. The parser takes any offer for
    accepted and the body for the other protocol's, so that it would be lost (Kludex/uvicorn#2722). Here the header gets
    another name before the parser sees it; WebSockets are not served.

    Where a body in chunks ends only the parser knows, so it is the last of its connection.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head = bytearray()  # what there is of the next one
        self._n_heads = 0  # that the parser has read
        self._in_body = False
        self._left: int | None = None  # bytes of the body that are to come; None for chunks
        self._n_aside = 0  # bytes since the last of a body in chunks
        self._later = b""  # what came behind a request that waits for its turn
        self._deaf = False  # to all that may still come
        self._running: RequestResponseCycle | None = None  # the request that is being answered, or was last
        self._deadline: asyncio.TimerHandle | None = None  # of what arrives
        self._patience: asyncio.TimerHandle | None = None  # with what is not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._deadline = self.loop.call_later(ARRIVAL_SECONDS, self._is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        self.pipeline.clear()
        self._later = b""
        if self._answering is not None:  # uvicorn tells only the newest
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        data = self._later + data
        self._later = b""
        while data and not self._deaf:
            if self.pipeline:  # one request may wait behind the one that is answered; the others stay bytes
                self._later = data
                self.flow.pause_reading()
                break
            data = self._read_body(data) if self._in_body else self._read_head(data)
        if (self._head or self._in_body) and self._deadline is None and not self._deaf:
            self._deadline = self.loop.call_later(ARRIVAL_SECONDS, self._is_late)

    def _read_head(self, data: bytes) -> bytes:
        """What is left of the data."""
        if not self._head:
            data = data.lstrip(b"\r\n")  # as the parser does
            if not data:
                return b""
            self._stop_waiting()
            self._unset_keepalive_if_required()
            if not data[:1].isalpha():  # TLS, say, whose head would never end
                self._end(400, NO_HTTP)
                return b""
        n_before = len(self._head)
        if n_before:
            self._head += data
        head = self._head or data
        end = HEAD_END.search(head, max(0, n_before - 2))
        length = len(head) if end is None else end.end()
        if length > HEAD_BYTES:
            self._end(431, f"the headers are longer than {HEAD_BYTES} bytes")
        elif end is None:
            self._head = self._head or bytearray(data)
        else:
            self._head = bytearray()
            n_parsed = self._n_heads
            self._parse(without_upgrade(bytes(head[:length])))
            if self._n_heads == n_parsed and not self._deaf:  # the parser sees no end where we do
                self._end(400, NO_HTTP)
            return data[length - n_before :]
        return b""

    def _read_body(self, data: bytes) -> bytes:
        """What is left of the data."""
        if self._left:
            piece, rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            self._parse(piece)
            return rest
        self._n_aside += len(data)
        self._parse(data)
        if self._n_aside > HEAD_BYTES and self._in_body and not self._deaf:
            self._end(431, f"the trailers are longer than {HEAD_BYTES} bytes")
        return b""

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # CONNECT
            self._end(400, NO_HTTP)
        except httptools.HttpParserError as error:
            if not self._deaf:
                log.debug("not HTTP", exc_info=error)
                self._end(400, str(error.__context__) if isinstance(error.__context__, Unfit) else NO_HTTP)

    def on_message_begin(self) -> None:
        if self._deaf:
            raise ValueError("a request behind a body in chunks")  # stops the parser
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        n_hosts = [name for name, _ in self.headers].count(b"host")
        if n_hosts > 1 or (n_hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise Unfit(NOT_ONE_HOST)  # RFC 9112, 3.2; it stops the parser
        coding = b", ".join(value for name, value in self.headers if name == b"transfer-encoding")
        if coding.lower() not in (b"", b"chunked"):  # the parser looks at the last alone
            raise Unfit(f"the transfer coding is {coding[:80].decode('latin-1')}: want chunked or none")
        super().on_headers_complete()
        headers = dict(self.headers)
        self.headers = []  # for trailers, which must not pass for headers
        self._n_heads += 1
        self._in_body, self._n_aside = True, 0
        self._left = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))

    def on_body(self, body: bytes) -> None:
        self._n_aside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._stop_waiting()
        if self._left is None:
            self._deaf, self.cycle.keep_alive = True, False
            if self.cycle.response_complete:  # refused before it was there
                self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._later and not self.transport.is_closing():
            self.data_received(b"")
        if self._head or self._in_body:  # it is not idle
            self._unset_keepalive_if_required()

    @property
    def _answering(self) -> RequestResponseCycle | None:
        """The request that is being answered, if there is one."""
        return None if self._running is None or self._running.response_complete else self._running

    def shutdown(self) -> None:
        if self._head or self._in_body:
            self._end(503, DRAINING)
        else:
            super().shutdown()

    def _is_late(self) -> None:
        self._deadline = None
        arriving = self.cycle if self._in_body else None
        if self._answering is not None and self._answering is not arriving:  # what came before it goes before it
            self._deadline = self.loop.call_later(ARRIVAL_SECONDS, self._is_late)
        elif self._head or self._in_body:
            self._end(408, f"the request has not arrived within {ARRIVAL_SECONDS:g} s")
        else:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self, status: int, detail: str) -> None:
        """Answer a request that has not arrived in whole, unless it has been answered, and hang up."""
        arriving = self.cycle if self._in_body else None
        self._deaf, self._in_body, self._head, self._later = True, False, bytearray(), b""
        self._stop_waiting()
        log.debug("a request is refused as it arrives: %d %s", status, detail)
        if (earlier := self._answering) is not None and earlier is not arriving:
            earlier.keep_alive = False  # the connection ends with its answer
            self.pipeline.clear()
            return
        if arriving is None or not arriving.response_started:
            self._say(status, detail)
        if arriving is not None:
            arriving.disconnected = True  # so that nobody answers it once more
            arriving.message_event.set()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(PARTING_SECONDS, self.transport.abort)

    def _say(self, status: int, detail: str) -> None:
        call, phrase = calls.fresh_id(), HTTPStatus(status).phrase
        problem = Problem(type="about:blank", title=phrase, status=status, detail=detail, request_id=call)
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {PROBLEM_JSON}\r\nX-Request-Id: {call}\r\n"
        if status == STATUS["unavailable"]:  # not of HTTP alone
            problem = problem_of(Unavailable.draining(), call)
            head += f"Retry-After: {RETRY_SECONDS}\r\n"
        body = problem.model_dump_json().encode("ascii")
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._patience is None:
            self._patience = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def without_upgrade(head: bytes) -> bytes:
    """Offers of another protocol under a name that means nothing. Most heads have none."""
    return UPGRADE.sub(b"\nx-offered-upgrade:", head) if b"pgrade" in head.lower() else head
