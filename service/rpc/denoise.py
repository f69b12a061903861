"""The service `rdt.v1.Denoiser`.

Bytes in, bytes out: messages are parsed here, so that one that cannot be read is reported as its sender's error.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc

from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rpc.convert import (
    SERVICE,
    Parsed,
    batch_fields,
    parse,
    request_fields,
    to_event,
    to_model,
    to_response,
    to_result,
)
from service.rpc.errors import Context, mapped_errors
from service.rpc.pb import denoiser_pb2 as pb

MARGIN_SECONDS = 0.02
"""How long before the call's deadline the answer should be ready, to arrive in time."""
ROUNDING = 0.01
"""Share by which a deadline may have been rounded up: gRPC sends timeouts with two to three digits."""


class DenoiserCalls:
    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, max_message_bytes: int) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes

    def handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        calls: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Denoise": unary(self.denoise),
            "DenoiseBatch": unary(self.denoise_batch),
            "DenoiseStream": stream(self.denoise_stream),
            "GetModel": unary(self.get_model),
        }
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    async def denoise(self, message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            with self._metrics.failure("grpc"):
                denoiser = self._lifecycle.denoiser
                request = denoiser.read(request_fields(self._parsed(pb.DenoiseRequest, message)))
            answer = await denoiser.denoise(request, "grpc", seconds_left(context), cut_at(context))
            return to_response(answer).SerializeToString()

    async def denoise_batch(self, message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            with self._metrics.failure("grpc"):
                denoiser = self._lifecycle.denoiser
                fields = batch_fields(self._parsed(pb.DenoiseBatchRequest, message))
                items = denoiser.read_batch(fields, options_at="options")
            ends = await denoiser.denoise_batch(items, "grpc", seconds_left(context), cut_at(context))
            return pb.DenoiseBatchResponse(results=map(to_result, ends)).SerializeToString()

    async def denoise_stream(self, message: bytes, context: Context) -> None:
        async with mapped_errors(context):
            with self._metrics.failure("grpc"):
                denoiser = self._lifecycle.denoiser
                request = denoiser.read(request_fields(self._parsed(pb.DenoiseRequest, message)))
            left, end = seconds_left(context), cut_at(context)
            async with aclosing(denoiser.denoise_stream(request, "grpc", left, end)) as events:
                async for event in events:
                    await context.write(to_event(event).SerializeToString())

    async def get_model(self, _message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            return to_model(self._lifecycle.denoiser.card).SerializeToString()

    def _parsed(self, kind: type[Parsed], message: bytes) -> Parsed:
        return parse(kind, message, self._max_message_bytes)


def seconds_left(context: Context) -> float | None:
    """Seconds until the answer should be ready for the call's own deadline; None if it has none."""
    left = context.time_remaining()
    return None if left is None else left - min(MARGIN_SECONDS + ROUNDING * left, left / 4)


def cut_at(context: Context) -> float | None:
    """When, on the event loop's clock, a call without an answer ends by itself, before gRPC cancels it as if its caller
    had left: halfway between the time for the answer to be ready and the call's deadline.
    """
    left, total = seconds_left(context), context.time_remaining()
    return None if left is None or total is None else asyncio.get_running_loop().time() + (left + total) / 2
