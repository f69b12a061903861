"""HTTP as uvicorn speaks it, but for offers to speak something else."""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)


class Http(HttpToolsProtocol):
    """A request that offers an upgrade is answered as if it did not, which is what HTTP asks of who takes none.

    Java's own client offers HTTP/2 with every request, and so does `curl --http2`. The parser takes any offer for
    accepted and the body for the other protocol's, so that it would be lost (Kludex/uvicorn#2722). Here the header gets
    another name before the parser sees it; WebSockets are not served.
    """

    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            head, blank, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nx-offered-upgrade:", head) + blank + rest
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()
