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
from service.limits import ARRIVAL_SECONDS
from service.rest.errors import STATUS, problem_of
from service.rest.problem import PROBLEM_JSON, Problem

log = logging.getLogger(__name__)

HEAD_BYTES = 65_536
"""Longest request line with headers, and longest trailers of a chunked body. uvicorn does not bound them."""
MOST_HEADERS = 100
"""Headers of a request, and trailers. Each takes over 100 bytes of memory, however short it is."""
UNREAD_BYTES = 65_536
"""So much of what comes behind a request that waits for its turn is taken in. With more nothing is read until it is its
turn, and if the caller hangs up, that is noticed only then.
"""
IDLE_SECONDS = 75
"""How long a connection is kept between two requests. Proxies and clients keep theirs for up to a minute; a request
that meets the end of one is lost."""
READING_SECONDS = 30.0
"""How long a caller may read nothing of what is sent to it, and how long it has for the rest when the connection is to
be closed."""
PARTING_SECONDS = 1.0
"""How long a connection stays open after a request was refused as it arrived: closed at once, the caller might not get
the answer."""
HEAD_END = re.compile(rb"\n\r?\n")
UPGRADE = re.compile(rb"\nupgrade[ \t]*:", re.IGNORECASE)
NO_HTTP = "Invalid HTTP request received."
NOT_ONE_HOST = "the request does not say for whom it is: want one header Host"


class BadHead(ValueError):
    """Why we refuse a head that the parser accepts."""

    status = 400


class ManyHeaders(BadHead):
    status = 431


class Http(HttpToolsProtocol):
    """A request that arrives too slowly, has too long a head, or is still arriving when the server shuts down is
    answered with an error, and its connection is closed.

    A request that offers an upgrade is answered as if it did not, as HTTP asks of servers that do not upgrade. Java's
    own client offers HTTP/2 with every request, and so does `curl --http2`. The parser assumes that every offer is
    accepted and takes the body for the other protocol's, so that it would be lost (Kludex/uvicorn#2722). Here the
    header gets another name before the parser sees it. WebSockets are not served.

    Only the parser knows where a chunked body ends, so a request with one is the last of its connection.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head = bytearray()  # of the next request, as far as it has arrived
        self._n_heads = 0  # heads that the parser has read
        self._in_body = False
        self._body_left: int | None = None  # bytes of the body still to come; None: it is chunked
        self._n_since_body = 0  # bytes since the last data of a chunked body: chunk sizes, trailers
        self._unread = b""  # bytes behind a request that waits for its turn
        self._ignores_input = False  # from now on
        self._running: RequestResponseCycle | None = None  # the request being answered, or the last one that was
        self._arrival_timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._arrival_timer = self.loop.call_later(ARRIVAL_SECONDS, self._arrival_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_arrival_timer()
        self._stop_reading_timer()
        self._unset_keepalive_if_required()
        if self._answering is not None:  # uvicorn tells only the newest request
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)
        self._in_body, self._running = False, None
        self.cycle = None  # type: ignore[assignment] # requests know the connection: what it holds is freed at once
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        self._unread = b""
        while data and not self._ignores_input:
            if self.pipeline:  # one request may wait behind the one being answered; further ones stay unread
                self._unread = data
                if len(data) > UNREAD_BYTES:
                    self.flow.pause_reading()
                break
            data = self._read_body(data) if self._in_body else self._read_head(data)
        if (self._head or self._in_body) and self._arrival_timer is None:
            self._arrival_timer = self.loop.call_later(ARRIVAL_SECONDS, self._arrival_timed_out)

    def _read_head(self, data: bytes) -> bytes:
        """Take the data of a head. Returns what comes after it."""
        if not self._head:
            data = data.lstrip(b"\r\n")  # as the parser does
            if not data:
                return b""
            self._stop_arrival_timer()
            self._unset_keepalive_if_required()
            if not data[:1].isalpha():  # TLS, say, in which no end of a head would be found
                self._refuse(400, NO_HTTP)
                return b""
        n_before = len(self._head)
        if n_before:
            self._head += data
        head = self._head or data
        end = HEAD_END.search(head, max(0, n_before - 2))
        length = len(head) if end is None else end.end()
        if length > HEAD_BYTES:
            self._refuse(431, f"the headers are longer than {HEAD_BYTES} bytes")
        elif end is None:
            self._head = self._head or bytearray(data)
        else:
            self._head = bytearray()
            n_parsed = self._n_heads
            self._parse(without_upgrade(bytes(head[:length])))
            if self._n_heads == n_parsed and not self._ignores_input:  # the parser sees no end of the head where we do
                self._refuse(400, NO_HTTP)
            return data[length - n_before :]
        return b""

    def _read_body(self, data: bytes) -> bytes:
        """Take the data of a body. Returns what comes after it."""
        if self._body_left:
            piece, rest = data[: self._body_left], data[self._body_left :]
            self._body_left -= len(piece)
            self._parse(piece)
            return rest
        self._n_since_body += len(data)
        self._parse(data)
        if self._n_since_body > HEAD_BYTES and self._in_body:
            self._refuse(431, f"the trailers are longer than {HEAD_BYTES} bytes")
        return b""

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # CONNECT
            self._refuse(400, NO_HTTP)
        except httptools.HttpParserError as error:
            if not self._ignores_input:
                log.debug("not HTTP", exc_info=error)
                bad = error.__context__
                self._refuse(*((bad.status, str(bad)) if isinstance(bad, BadHead) else (400, NO_HTTP)))

    def on_message_begin(self) -> None:
        if self._ignores_input:
            raise ValueError("a request behind a chunked body")  # stops the parser
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) == MOST_HEADERS:
            raise ManyHeaders(f"there are more than {MOST_HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        n_hosts = [name for name, _ in self.headers].count(b"host")
        if n_hosts > 1 or (n_hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise BadHead(NOT_ONE_HOST)  # RFC 9112, 3.2; raising stops the parser
        coding = b", ".join(value for name, value in self.headers if name == b"transfer-encoding")
        if coding.lower() not in (b"", b"chunked"):  # the parser looks only at the last
            shown = coding[:80].decode("ascii", "backslashreplace")
            raise BadHead(f"the transfer coding is {shown}: want chunked or none")
        super().on_headers_complete()
        self.flow.resume_reading()  # which uvicorn stops while another is answered: a hangup would not be noticed
        self.cycle.transport = _Answering(self)  # type: ignore[assignment] # all that uvicorn uses
        headers = dict(self.headers)
        self.headers = []  # the parser adds trailers, which must not pass for headers
        self._n_heads += 1
        self._in_body = True
        self._body_left = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))

    def on_body(self, body: bytes) -> None:
        self._n_since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._stop_arrival_timer()
        if self._body_left is None:
            self._ignores_input, self.cycle.keep_alive = True, False
        if self.cycle.response_complete:  # it was refused before it had arrived
            if self.cycle.keep_alive:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            else:
                self._ignores_input = True
                self.close()

    def hears_out(self) -> bool:
        """Whether a request has been answered and is still arriving."""
        return self._in_body and self.cycle.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unread and not self.transport.is_closing():
            self.data_received(b"")
        if self._head or self._in_body:  # the connection is not idle
            self._unset_keepalive_if_required()

    @property
    def _answering(self) -> RequestResponseCycle | None:
        """The request being answered, if there is one."""
        return None if self._running is None or self._running.response_complete else self._running

    def shutdown(self) -> None:
        if self._head or self._in_body:
            self._refuse(503, DRAINING)
        else:
            super().shutdown()

    def _arrival_timed_out(self) -> None:
        arriving = self.cycle if self._in_body else None
        if self._answering is not None and self._answering is not arriving:  # the earlier request is answered first
            self._arrival_timer = self.loop.call_later(ARRIVAL_SECONDS, self._arrival_timed_out)
        elif self._head or self._in_body:
            self._refuse(408, f"the request has not arrived within {ARRIVAL_SECONDS:g} s")
        else:
            self.close()

    def _stop_arrival_timer(self) -> None:
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
            self._arrival_timer = None

    def _refuse(self, status: int, detail: str) -> None:
        """Answer a request that has not fully arrived, unless it has been answered, and close the connection."""
        arriving = self.cycle if self._in_body else None
        self._ignores_input, self._in_body, self._head = True, False, bytearray()
        self._stop_arrival_timer()
        log.debug("a request is refused as it arrives: %d %s", status, detail)
        if (earlier := self._answering) is not None and earlier is not arriving:
            earlier.keep_alive = False  # the connection ends with its answer, and no request that waits gets one
            return
        if arriving is None or not arriving.response_started:
            self._write_problem(status, detail)
        if arriving is not None:
            arriving.disconnected = True  # so that it is not answered again
            arriving.message_event.set()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._arrival_timer = self.loop.call_later(PARTING_SECONDS, self.transport.abort)

    def _write_problem(self, status: int, detail: str) -> None:
        call, phrase = calls.fresh_id(), HTTPStatus(status).phrase
        problem = Problem(type="about:blank", title=phrase, status=status, detail=detail, request_id=call)
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {PROBLEM_JSON}\r\nX-Request-Id: {call}\r\n"
        if status == STATUS["unavailable"]:  # the one error here that has a neutral code
            problem = problem_of(Unavailable.draining(), call)
            head += f"Retry-After: {RETRY_SECONDS}\r\n"
        body = problem.model_dump_json().encode("ascii")
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body)

    def eof_received(self) -> None:
        self.close()

    def timeout_keep_alive_handler(self) -> None:
        self.close()

    def close(self) -> None:
        """Once all that was said is sent."""
        if not self.transport.is_closing():
            self.transport.close()
            self._start_reading_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_reading_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_reading_timer()

    def _start_reading_timer(self) -> None:
        if self._reading_timer is None:
            self._reading_timer = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None


class _Answering:
    """A connection as the answer to one request uses it. After an answer that came before all of its request, the
    connection stays open until the rest has arrived: closed before, it would be reset, and the caller might not get the
    answer.
    """

    def __init__(self, http: Http) -> None:
        self._http = http
        self.write, self.is_closing = http.transport.write, http.transport.is_closing

    def close(self) -> None:
        if not self._http.hears_out():
            self._http.close()


def without_upgrade(head: bytes) -> bytes:
    """The head with its header Upgrade, if it has one, renamed."""
    return UPGRADE.sub(b"\nx-offered-upgrade:", head)
