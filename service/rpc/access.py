"""Asks for the key on every call but those that ask whether the server is well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health

from service.access import ApiKey
from service.errors import Unauthenticated
from service.metrics import Metrics
from service.rpc.calls import Details, Handler, refusal
from service.rpc.convert import INFERENCE_SERVICE

OPEN = (f"/{health.SERVICE_NAME}/", f"/{INFERENCE_SERVICE}/ServerLive", f"/{INFERENCE_SERVICE}/ServerReady")


class Door(grpc.aio.ServerInterceptor):
    def __init__(self, key: ApiKey, metrics: Metrics) -> None:
        self._key = key
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        if handler_call_details.method.startswith(OPEN):
            return await continuation(handler_call_details)
        sent = dict(handler_call_details.invocation_metadata)
        presented = [_bytes(sent.get(name, "")) for name in ("authorization", "x-api-key")]
        try:
            with self._metrics.failure("grpc"):
                self._key.check(*presented)
        except Unauthenticated as error:
            return refusal(error)
        return await continuation(handler_call_details)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
