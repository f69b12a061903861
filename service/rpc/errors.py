"""Errors as gRPC statuses, and the one map from neutral codes to status codes.

Fields that are to blame travel as `google.rpc.BadRequest`, which clients in every language know how to
read; it costs two small packages of generated code.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from service import calls
from service.errors import Code, Internal, Refused, ServiceError
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


def status_of(error: ServiceError) -> grpc.Status:
    """Code and message, and for programs: the neutral code, bad fields, and when to try again."""
    details: list[Message] = [ErrorInfo(reason=error.code.upper(), domain=SERVICE)]
    if error.problems:
        violations = [
            BadRequest.FieldViolation(field=problem.field, description=problem.message) for problem in error.problems
        ]
        details.append(BadRequest(field_violations=violations))
    if isinstance(error, Refused):
        details.append(RetryInfo(retry_delay=Duration(seconds=error.retry_seconds)))
    status = Status(code=STATUS[error.code].value[0], message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    return rpc_status.to_status(status)


async def fail(context: Context, error: ServiceError) -> None:
    """Ends the call with the error's status: raises, as `abort` does."""
    calls.note(error.code)
    status = status_of(error)
    trailing = (*(context.trailing_metadata() or ()), *(status.trailing_metadata or ()))  # `abort` would replace it
    await context.abort(status.code, status.details, trailing)


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
