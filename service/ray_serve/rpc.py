"""gRPC inside a replica. Serve's proxy hands over a message and its metadata; `service.rpc` answers it, interceptors
(ids, spans, the key) included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, cast

import grpc

from service.access import ApiKey
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.pump import pumped
from service.ray_serve.proxy import SECONDS_LEFT
from service.rpc.access import Door
from service.rpc.calls import Calls
from service.rpc.convert import DENOISER, INFERENCE
from service.rpc.denoise import DenoiserCalls
from service.rpc.errors import Context
from service.rpc.open_inference import InferenceCalls
from service.tracing import NO_TRACER, Tracer

Metadata = list[tuple[str, Any]]
Answer = Callable[[bytes, Context], Awaitable[Any]]

PATHS = {
    call.name: f"/{service.full_name}/{call.name}" for service in (DENOISER, INFERENCE) for call in service.methods
}
"""Serve tells a replica the method alone."""


class ServeContext(Protocol):
    """What is used of Serve's `RayServegRPCContext`."""

    def invocation_metadata(self) -> Metadata: ...

    def set_code(self, code: Any) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None: ...


@dataclass(frozen=True)
class Encoded:
    """A serialised message, with the one method that Serve calls on messages."""

    message: bytes = b""

    def SerializeToString(self) -> bytes:
        return self.message


@dataclass(frozen=True)
class Details:
    """What an interceptor reads of a call."""

    method: str
    invocation_metadata: Metadata


class Ended(Exception):
    """The call has been given its status."""


class CallContext:
    """The context of a call, as the handlers and interceptors of `service.rpc` use it."""

    def __init__(self, context: ServeContext, write: Callable[[Encoded], None] | None = None) -> None:
        self._context = context
        self._write = write
        self._trailing: Metadata = []
        self._clock = asyncio.get_running_loop().time
        left = dict(context.invocation_metadata()).get(SECONDS_LEFT)
        self._deadline = None if left is None else self._clock() + float(left)

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else self._deadline - self._clock()

    def invocation_metadata(self) -> Metadata:
        return self._context.invocation_metadata()

    def trailing_metadata(self) -> Metadata:
        return self._trailing

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailing = [(key, value) for key, value in trailing_metadata]
        self._context.set_trailing_metadata(self._trailing)

    async def write(self, message: bytes) -> None:
        assert self._write is not None, "a call with one answer"
        self._write(Encoded(message))

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        self._context.set_code(code)
        self._context.set_details(details)
        self.set_trailing_metadata(trailing_metadata)
        raise Ended


class ServeCalls:
    """Answers each call as `service.rpc.server` would."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        metrics: Metrics,
        *,
        max_message_bytes: int,
        api_key: str | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        services = DenoiserCalls, InferenceCalls
        self._handlers = [calls(lifecycle, metrics, max_message_bytes).handler() for calls in services]
        self._interceptors: list[grpc.aio.ServerInterceptor] = []
        if api_key is not None:
            self._interceptors.append(Door(ApiKey(api_key), metrics))
        self._interceptors.append(Calls(tracer))  # the outermost last

    async def unary(self, method: str, message: bytes, context: ServeContext) -> Encoded:
        """The answer; or an empty message, and the status in the context."""
        try:
            return Encoded(await self._answer(method, message, CallContext(context)))
        except Ended:
            return Encoded()

    def stream(self, method: str, message: bytes, context: ServeContext) -> AsyncGenerator[Encoded, None]:
        """Ends with an empty message when it ends with an error: without one, Serve would not see the status."""

        async def answer(put: Callable[[Encoded], None]) -> None:
            try:
                await self._answer(method, message, CallContext(context, put))
            except Ended:
                put(Encoded())

        return pumped(answer)

    async def _answer(self, method: str, message: bytes, context: CallContext) -> Any:
        find: Any = self._find
        for interceptor in self._interceptors:
            find = partial(interceptor.intercept_service, find)
        handler = await find(Details(PATHS[method], context.invocation_metadata()))
        answer: Answer = handler.unary_unary or handler.unary_stream or handler.stream_stream  # the last refuses
        return await answer(message, cast(Context, context))

    async def _find(self, details: Any) -> Any:
        found = (handler.service(details) for handler in self._handlers)
        return next(handler for handler in found if handler is not None)
