"""HTTP as uvicorn speaks it, with limits on how a request arrives, and deaf to offers to speak something else."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.rest.problem import PROBLEM_JSON, Problem

HEAD_BYTES = 65_536
"""Of a request line and its headers. Nothing else bounds them."""
ARRIVAL_SECONDS = 30.0
"""Until a request has arrived, head and body, from its first byte on; and until the first byte of a connection."""
UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)


class Http(HttpToolsProtocol):
    """What arrives too slowly or with too long a head is answered with an error, and so is what is still arriving when
    the server shuts down; then the connection is closed.

    A request that offers an upgrade is answered as if it did not, which is what HTTP asks of who takes none.
    Java's own client offers HTTP/2 with every request, and so does `curl --http2`. The parser takes any offer for
    accepted and the body for the other protocol's, so that it would be lost (Kludex/uvicorn#2722). Here the header gets
    another name before the parser sees it; WebSockets are not served.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head = True
        self._n_head = 0
        self._arriving = False  # between the first byte of a request and its last
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            head, blank, rest = data.partition(b"\r\n\r\n")
            self._n_head += len(head)
            if self._n_head > HEAD_BYTES:
                self._end(431, f"the headers are longer than {HEAD_BYTES} bytes")
                return
            data = UPGRADE.sub(b"\r\nx-offered-upgrade:", head) + blank + rest
        super().data_received(data)
        if not self._arriving:
            self._expect_no_more()
        elif self._deadline is None:
            self._expect()

    def on_message_begin(self) -> None:
        self._arriving = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._n_head = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._arriving = True, False
        super().on_message_complete()

    def shutdown(self) -> None:
        if self._arriving and not self._answering:
            self._end(503, "the server is shutting down and takes no new work")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._end(400, msg)

    @property
    def _answering(self) -> bool:
        """An answer is being made or written that is not of the request that arrives."""
        if self._in_head:
            return self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or (self.cycle.response_started and not self.cycle.response_complete)

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(ARRIVAL_SECONDS, self._is_late)

    def _expect_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_late(self) -> None:
        self._deadline = None
        if self._arriving and self._answering:
            self._expect()
        elif self._arriving:
            self._end(408, f"the request has not arrived within {ARRIVAL_SECONDS:g} s")
        else:
            self.transport.close()

    def _end(self, status: int, detail: str) -> None:
        """Answer a request that has not arrived in whole, unless it has been answered, and hang up."""
        if not (self._answering or (not self._in_head and self.cycle.response_complete)):
            problem = Problem(type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail)
            body = problem.model_dump_json().encode("ascii")
            self.transport.write(
                f"HTTP/1.1 {status} {problem.title}\r\nContent-Type: {PROBLEM_JSON}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii")
                + body
            )
        self.transport.close()
