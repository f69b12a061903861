"""Records every HTTP request once it has ended: a log line at debug level, and a span for POST."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import calls
from service.process.logs import fields
from service.rest.errors import STATUS
from service.tracing import CONTEXT_HEADERS, NO_TRACER, Tracer

log = logging.getLogger(__name__)

OUTCOMES = {status: code for code, status in STATUS.items() if code != "not_found"}  # which any wrong path answers


class Observer:
    """Runs inside `RequestId`. Only POST gets a span: probes and scrapes would hide what matters."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = calls.current.get()
        if scope["type"] != "http" or call is None:
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        method: str = scope["method"]
        status = 500  # of a crash before the response starts, which is answered outside of here

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = Headers(scope=scope)
        context = {name: ",".join(headers.getlist(name)) for name in CONTEXT_HEADERS}
        tracer = self._tracer if method == "POST" else NO_TRACER
        with tracer.call(call, method, {"http.request.method": method}, context) as span:
            try:
                with calls.ending(call):
                    await self._app(scope, receive, send_noting_status)
            finally:
                if call.outcome == "ok" and status >= 400:
                    call.outcome = OUTCOMES.get(status, f"http_{status}")
                span.set_attributes({"http.response.status_code": status})
                route: str = getattr(scope.get("route"), "path", "")
                if route:
                    span.update_name(f"{method} {route}")
                    span.set_attributes({"http.route": route})
                if log.isEnabledFor(logging.DEBUG):
                    _log(method, route, status, call.outcome, time.monotonic() - began)


def _log(method: str, route: str, status: int, outcome: str, seconds: float) -> None:
    ms = calls.milliseconds(seconds)
    named = fields(method=method, route=route, status=status, outcome=outcome, duration_ms=ms)
    log.debug("%s %s: %d %s after %.1f ms", method, route or "?", status, outcome, ms, extra=named)
