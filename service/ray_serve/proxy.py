"""In front of the replicas: makes Serve's proxies answer as a single server would.

gRPC, `grpc_servicer_functions: [service.ray_serve.proxy:add_denoiser]`. Messages pass as bytes, so that the replica
answers those that cannot be parsed. Three things are added to Serve's calls to its replicas:

- the call's deadline is sent on as metadata, so that replicas can answer before it;
- the empty message by which a replica ends a stream with an error is held back;
- Serve's own errors (a replica lost, all full) get the status that our server would give them.

HTTP, `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=service.ray_serve.proxy:middlewares` in the environment of Ray:
the last of the three, with problem documents.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import DeadlineExceeded, Internal, ResourceExhausted, ServiceError, Unavailable
from service.pump import pumped
from service.rest.errors import problem_response
from service.rpc.convert import DENOISER, INFERENCE
from service.rpc.errors import status_of

SECONDS_LEFT = "rdt-seconds-left"
"""Metadata that says how long the call has left: Serve's own context has no deadline."""
DETAILS = "grpc-status-details-bin"
"""Metadata of every error of a replica, and of none of Serve's own."""
ACTOR = "The actor "
"""How Ray's message begins when a replica has died or cannot be reached."""

LOST = Unavailable("the replica was lost before it answered: send the request again", "failed")
FULL = ResourceExhausted("all replicas are full: try again later", "queue_requests")
NONE_READY = Unavailable("no replica takes requests now", "failed")
LATE = DeadlineExceeded("no replica answered in the time that a request may take")
BROKEN = Internal()

UnaryCall = Callable[[bytes, Any], Awaitable[bytes]]
StreamCall = Callable[[bytes, Any], AsyncIterator[bytes]]


def add_denoiser(_servicer: object, server: Any) -> None:
    """Adds our services to Serve's gRPC server, which replaces the handlers by calls to its replicas."""
    for service in (DENOISER, INFERENCE):
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            method.name: grpc.unary_stream_rpc_method_handler(_nothing)
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler(_nothing)
            for method in service.methods
        }
        handler: Any = grpc.method_handlers_generic_handler(service.full_name, handlers)
        server.add_generic_rpc_handlers((handler,))
        handler._method_handlers = {
            name: serves._replace(unary_unary=unary(serves.unary_unary), unary_stream=stream(serves.unary_stream))
            for name, serves in handler._method_handlers.items()
        }


def unary(call: UnaryCall) -> UnaryCall:
    async def answer(message: bytes, context: Any) -> bytes:
        answered = await call(message, Passing(context))
        _set_our_status(context)
        return answered

    return answer


def stream(call: StreamCall) -> StreamCall:
    async def events(message: bytes, context: Any) -> AsyncIterator[bytes]:
        passing = Passing(context)

        async def pull(put: Callable[[bytes], None]) -> None:
            async for event in call(message, passing):
                if event:
                    put(event)

        # If the caller leaves while an event is written, Serve's own iterator does not tell the replica: it has to be
        # cancelled while it waits for the next event.
        async with aclosing(pumped(pull)) as pulled:
            async for event in pulled:
                yield event
        _set_our_status(context)

    return events


class Passing:
    """The context of a call, with the time it has left in its metadata. All else is the context's own.

    The peer is read at once: Serve logs it at the end, and reading it after the call has gone crashes the process.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()
        left = context.time_remaining()
        sent = [(key, value) for key, value in context.invocation_metadata() or () if key != SECONDS_LEFT]
        self._metadata = sent if left is None else [*sent, (SECONDS_LEFT, f"{left:.6f}")]

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return self._metadata

    def peer(self) -> str:
        return str(self._peer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _set_our_status(context: Any) -> None:
    if any(key == DETAILS for key, _ in context.trailing_metadata() or ()):
        return
    code, details = context.code(), context.details() or ""
    error = our_error(code.value[0] if isinstance(code, grpc.StatusCode) else code, _text(details))
    if error is not None:
        status = status_of(error)
        context.set_code(status.code)
        context.set_details(status.details)
        context.set_trailing_metadata(status.trailing_metadata)


def our_error(number: int, details: str) -> ServiceError | None:
    """Our error for a status of Serve's own; None to leave the status as it is."""
    if number == grpc.StatusCode.INTERNAL.value[0]:
        return LOST if details.startswith(ACTOR) else BROKEN
    if number == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return FULL
    return NONE_READY if number == grpc.StatusCode.UNAVAILABLE.value[0] else None


REFUSALS: dict[int, ServiceError] = {408: LATE, 429: FULL, 503: NONE_READY}
"""Our errors for statuses that Serve answers over HTTP with plain text."""


def middlewares() -> list[Middleware]:
    return [Middleware(Problems)]


class Problems:
    """Answers with a problem document where Serve refuses in plain text, or not at all because a replica was lost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        error: ServiceError | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal started, error
            if message["type"] == "http.response.start":
                started = True
                plain = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/plain")
                error = REFUSALS.get(message["status"]) if plain else None
            if error is None:
                await send(message)

        await self._app(scope, receive, send_unless_refused)
        if error is not None or not started:
            request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
            response = problem_response(error or LOST, request_id, scope)
            response.headers["X-Request-Id"] = request_id
            await response(scope, receive, send)


def _text(details: str | bytes) -> str:
    return details.decode(errors="replace") if isinstance(details, bytes) else details


def _nothing(_message: bytes, _context: Any) -> Any:
    raise NotImplementedError("Serve has not taken this call over")
