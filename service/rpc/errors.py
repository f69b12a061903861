"""Errors as gRPC statuses, and the one map from neutral codes to status codes.

Fields that are to blame travel as `google.rpc.BadRequest`, which clients in every language know how to
read; it costs two small packages of generated code.
"""

from __future__ import annotations

import base64
import logging
import string
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from service import calls
from service.errors import Code, FieldProblem, Internal, Refused, ServiceError
from service.rpc.convert import SERVICE

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]

STATUS: dict[Code, grpc.StatusCode] = {
    "invalid_argument": grpc.StatusCode.INVALID_ARGUMENT,
    "malformed": grpc.StatusCode.INVALID_ARGUMENT,
    "unsupported_format": grpc.StatusCode.INVALID_ARGUMENT,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "too_large": grpc.StatusCode.INVALID_ARGUMENT,  # RESOURCE_EXHAUSTED would invite to send it again
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "resource_exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "failed_precondition": grpc.StatusCode.FAILED_PRECONDITION,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "cancelled": grpc.StatusCode.CANCELLED,
    "internal": grpc.StatusCode.INTERNAL,
}

STATUS_BYTES = 3_300
"""Longest status, as it is sent. Of a call's last headers, all together, nginx takes 4 KiB unless told otherwise: for
more it answers 502, and takes the server for broken. Clients take 8 KiB, and report more as RESOURCE_EXHAUSTED, as if
the queue were full.
"""
UNQUOTED = " " + string.punctuation.replace("%", "")
"""What gRPC sends as it is in a message, beside letters and digits."""


def status_of(error: ServiceError) -> grpc.Status:
    """Code and message, and for programs: the neutral code, bad fields, and when to try again. Of very many bad fields
    only as many as fit.
    """
    status = _status(error, error.message, error.problems)
    for n_shown in range(len(error.problems) - 1, 0, -1):
        if _n_bytes(status) <= STATUS_BYTES:
            break
        shown = error.problems[:n_shown]
        status = _status(error, "; ".join(problem.message for problem in shown) + "; and more", shown)
    return rpc_status.to_status(status)


def _status(error: ServiceError, message: str, problems: Sequence[FieldProblem]) -> Status:
    details: list[Message] = [ErrorInfo(reason=error.code.upper(), domain=SERVICE)]
    if problems:
        violations = [
            BadRequest.FieldViolation(field=problem.field, description=problem.message) for problem in problems
        ]
        details.append(BadRequest(field_violations=violations))
    if isinstance(error, Refused):
        details.append(RetryInfo(retry_delay=Duration(seconds=error.retry_seconds)))
    status = Status(code=STATUS[error.code].value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _n_bytes(status: Status) -> int:
    """The message once by itself, and once more in the details."""
    return len(quote(status.message, safe=UNQUOTED)) + len(base64.b64encode(status.SerializeToString()))


async def fail(context: Context, error: ServiceError) -> None:
    """Ends the call with the error's status: raises, as `abort` does."""
    calls.note(error.code)
    status = status_of(error)
    trailing = (*(context.trailing_metadata() or ()), *(status.trailing_metadata or ()))  # `abort` would replace it
    await context.abort(status.code, status.details, trailing)


def letting_go(answer: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    """The same, but nothing of a call that fails is kept: to be put around whatever gRPC calls.

    What `abort` raises gRPC keeps in its state of the call. The traceback leads back to that state, and to the message:
    all would stay until the garbage collector came by, hundreds of calls later.
    """

    async def answered(messages: Any, context: Context) -> Any:
        try:
            return await answer(messages, context)
        except grpc.aio.AbortError as abort:
            del messages, context  # this function is in the traceback, too
            error: BaseException | None = abort
            while error is not None:  # since Python 3.13 the error behind it keeps itself by its traceback, too
                error.__traceback__, error.__context__, error = None, None, error.__context__
            raise abort

    return answered


@asynccontextmanager
async def mapped_errors(context: Context) -> AsyncIterator[None]:
    """What the use case raises ends the call with its status; a bug of ours with INTERNAL, and is logged."""
    try:
        yield
    except ServiceError as error:
        await fail(context, error)
    except Exception:
        log.exception("a call failed")
        await fail(context, Internal())
