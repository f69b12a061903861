"""What happens to every HTTP request before a route sees it: an id, the key, the size of its body."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import calls
from service.access import ApiKey
from service.errors import TooLarge, Unauthenticated
from service.limits import Room
from service.metrics import Metrics
from service.rest.errors import problem_response, route


class RequestId:
    """Gives each request an id: the caller's own X-Request-Id if it is well-formed, or a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = calls.begin(Headers(scope=scope).get("x-request-id", "")).id
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Door:
    """Asks for the key on every path but the open ones. Runs inside `RequestId`."""

    def __init__(self, app: ASGIApp, key: ApiKey, open_paths: Collection[str], metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._key = key
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route(scope) not in self._open_paths:
            try:
                with self._metrics.failure("rest"):
                    present_key(Headers(scope=scope), self._key)
            except Unauthenticated as error:
                await problem_response(error, scope["state"]["request_id"], scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def present_key(headers: Headers, key: ApiKey) -> None:
    """Raises `Unauthenticated` unless the headers hold the key."""
    key.check(*(headers.get(name, "").encode("latin-1") for name in ("authorization", "x-api-key")))


class BodyLimit:
    """Refuses a body over the limit while it arrives, whether or not it declares its length. So that many callers who
    send slowly cannot take all memory, the bodies of all requests under way have a bound together, too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._room = Room(max_bytes, "bodies of all requests")  # until they are answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        too_large = TooLarge(f"the body is larger than {self._max_bytes} bytes")
        n_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal n_bytes
            if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_bytes):
                raise too_large
            message = await receive()
            n_new = len(message.get("body", b""))
            if n_bytes + n_new > self._max_bytes:
                raise too_large
            n_bytes += n_new
            self._room.take(n_new, n_bytes)
            return message

        try:
            await self._app(scope, receive_within_limit, send)
        finally:
            self._room.give_back(n_bytes)
