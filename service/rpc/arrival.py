"""How a call arrives: with limits on its metadata, and on the time of its message, that gRPC has not.

gRPC bounds the size of a message and the calls of a connection, and holds whatever has arrived of each for as long as
it takes: a few connections that send slowly could take all memory. It reads the message of a unary call by itself, and
that of a stream only when asked. So to gRPC every call is a stream of messages, of which the first one is read here.

Of metadata it says that they are too large, and hands the call over with all of them all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.errors import Malformed, ResourceExhausted, TooLarge
from service.limits import ARRIVAL_SECONDS, Room
from service.metrics import Metrics
from service.rpc.calls import Details, Handler, is_of_service, refusal
from service.rpc.errors import Context, letting_go, mapped_errors

METADATA_BYTES = 16_384
"""Longest metadata of a call, by the measure of RFC 7541, 4.1. It is set as gRPC's limit, too."""
SLOW_SECONDS = 2.0
"""A message that takes longer is a slow one."""
MOST_SLOW = 64
"""Slow messages at a time; with one more, the one that has taken longest is given up."""
LEAVING_SECONDS = 0.1
"""Without a message it takes a moment until gRPC cancels the call of a caller who has left."""


class Arrivals(grpc.aio.ServerInterceptor):
    """The outermost interceptor: all others see a call with its message. Calls that stream their requests it leaves.

    As over REST, the messages of all calls under way have a bound together.
    """

    def __init__(self, metrics: Metrics, max_bytes: int) -> None:
        self._metrics = metrics
        self._room = Room(max_bytes, "messages of all calls")  # until they are answered
        self._slow: dict[asyncio.Timeout, None] = {}  # the slowest first

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        counted = is_of_service(handler_call_details)
        try:
            with self._metrics.failure("grpc") if counted else nullcontext():
                check_size(handler_call_details.invocation_metadata)
        except TooLarge as error:
            return refusal(error)
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        answer: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        streams = handler.response_streaming
        kind = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return kind(self._with_message(answer, counted), handler.request_deserializer, handler.response_serializer)

    def _with_message(self, answer: Callable[..., Any], counted: bool) -> Callable[..., Any]:
        async def received(_messages: object, context: Context) -> Any:
            n_bytes = 0
            try:
                async with mapped_errors(context):
                    with self._metrics.failure("grpc") if counted else nullcontext():
                        message = await self._first_of(context)
                        n_bytes = len(message) if counted else 0
                        self._room.take(n_bytes, n_bytes)
                return await answer(message, context)
            finally:
                self._room.give_back(n_bytes)

        return letting_go(received)

    async def _first_of(self, context: Context) -> Any:
        """Raises `ResourceExhausted` when it takes too long, `Malformed` if there is none or it cannot be read."""
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS) as limit:
                timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._note_slow, limit)
                try:
                    message: Any = await context.read()
                finally:
                    timer.cancel()
                    self._slow.pop(limit, None)
        except TimeoutError:
            raise ResourceExhausted("the message took too long to arrive", "bodies") from None
        except DecodeError:
            raise Malformed("the message cannot be read") from None
        if message is grpc.aio.EOF:
            await asyncio.sleep(LEAVING_SECONDS)
            raise Malformed("the call has no message")
        return message

    def _note_slow(self, limit: asyncio.Timeout) -> None:
        self._slow[limit] = None
        if len(self._slow) > MOST_SLOW:
            slowest = next(iter(self._slow))
            del self._slow[slowest]
            if not slowest.expired():
                slowest.reschedule(asyncio.get_running_loop().time())


def check_size(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Raises `TooLarge`. Such a call is to end at once: it would hold its metadata until its connection ended."""
    if sum(len(key) + len(value) + 32 for key, value in metadata or ()) > METADATA_BYTES:
        raise TooLarge(f"the metadata have over {METADATA_BYTES} bytes")
