"""What happens around every call of the service: an id, a line at debug level once it has ended, and a span if it
restores texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import grpc

from service import calls
from service.errors import ServiceError
from service.process.logs import fields
from service.rpc.convert import SERVICES
from service.rpc.errors import STATUS, Context, fail, letting_go
from service.tracing import CONTEXT_HEADERS, NO_TRACER, Tracer

log = logging.getLogger(__name__)

ID_KEY = "x-request-id"
RESTORING = frozenset({"Denoise", "DenoiseBatch", "DenoiseStream", "ModelInfer"})
"""Calls that have a span. Others would hide them: clients of the Open Inference Protocol ask every few seconds whether
the server is ready."""

KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,  # of a refusal, whatever was called
}

Details = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # quoted: it is generic in the stubs only
NUMBERS: Mapping[str, int] = {code: status.value[0] for code, status in STATUS.items()}


def is_of_service(details: Details) -> bool:
    """Whether the call is of a service that restores texts, and not of health or reflection."""
    return service_of(details) in SERVICES


def service_of(details: Details) -> str:
    method: str = details.method
    return method.removeprefix("/").rpartition("/")[0]


def refusal(error: ServiceError) -> Handler:
    """Of a call of any kind: to its caller all that end at once with a status look the same. It reads no message."""

    async def refuse(_messages: object, context: Context) -> None:
        await fail(context, error)

    return grpc.stream_stream_rpc_method_handler(letting_go(refuse))


class Calls(grpc.aio.ServerInterceptor):
    """Around all interceptors but `Arrivals`. The id is sent with the status at the end: that costs no message."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not is_of_service(handler_call_details):
            return handler
        for name, kind in KINDS.items():
            if (answer := getattr(handler, name)) is not None:
                return kind(letting_go(self._around(answer, handler_call_details)))
        raise NotImplementedError("the service has no calls of other kinds")

    def _around(self, answer: Callable[..., Any], details: Details) -> Callable[..., Any]:
        name = details.method.rpartition("/")[2]
        tracer = self._tracer if name in RESTORING else NO_TRACER
        sent = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

        async def observed(message: bytes, context: Context) -> Any:
            began = time.monotonic()
            call = calls.begin(sent.get(ID_KEY, ""))
            context.set_trailing_metadata(((ID_KEY, call.id),))
            attributes = {"rpc.system": "grpc", "rpc.service": service_of(details), "rpc.method": name}
            headers = {key: sent.get(key, "") for key in CONTEXT_HEADERS}
            with tracer.call(call, details.method[1:], attributes, headers) as span:
                try:
                    with calls.ending(call):
                        return await answer(message, context)
                finally:
                    span.set_attributes({"rpc.grpc.status_code": NUMBERS.get(call.outcome, 0)})
                    if log.isEnabledFor(logging.DEBUG):
                        _log(name, call.outcome, time.monotonic() - began)

        return observed


def _log(method: str, outcome: str, seconds: float) -> None:
    duration_ms = calls.milliseconds(seconds)
    named = fields(method=method, outcome=outcome, duration_ms=duration_ms)
    log.debug("%s: %s after %.1f ms", method, outcome, duration_ms, extra=named)
