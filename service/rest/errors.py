"""Errors as RFC 9457 problem documents, and the one map from neutral codes to HTTP status.

Below `/v2` what went wrong stands in the member `error`, too, where clients of the Open Inference Protocol look for it
(RFC 9457, section 3.2, admits more members).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from service import calls
from service.errors import Code, Internal, RefusalReason, Refused, ServiceError, printable
from service.rest.problem import PROBLEM_JSON, BadField, Problem

OPEN_INFERENCE = "/v2"
"""The Open Inference Protocol is below this path."""

STATUS: dict[Code, int] = {
    "invalid_argument": 422,
    "malformed": 400,
    "unsupported_format": 415,
    "not_found": 404,
    "too_large": 413,
    "unauthenticated": 401,
    "resource_exhausted": 429,
    "unavailable": 503,
    "failed_precondition": 409,
    "deadline_exceeded": 504,
    "cancelled": 499,  # nobody is left to read it; nginx's number, for the access log
    "internal": 500,
}
TITLE: dict[Code, str] = {
    "invalid_argument": "A field has a value that is not allowed",
    "malformed": "The request cannot be read",
    "unsupported_format": "The request is in a format that is not read here",
    "not_found": "No such model is served",
    "too_large": "The request is too large",
    "unauthenticated": "A valid key is needed",
    "resource_exhausted": "The queue is full",
    "unavailable": "The server takes no requests now",
    "failed_precondition": "The server cannot do that as things are",
    "deadline_exceeded": "The deadline passed before there was an answer",
    "cancelled": "The caller left",
    "internal": "Internal error",
}

TITLE_OF_REASON: dict[RefusalReason, str] = {
    "memory": "The server is short of memory",
    "bodies": "Too much is being sent at once",
}
"""Where the code says too little."""

_ALL_REASONS = "The queue is full, the server is short of memory, or too much is being sent at once"
_RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}}
_MORE: dict[Code, dict[str, object]] = {
    "resource_exhausted": {"description": _ALL_REASONS, "headers": _RETRY_AFTER},
    "unavailable": {"headers": _RETRY_AFTER},
}
"""What the OpenAPI document says of an error beside its title."""

_ELSEWHERE = ("not_found", "failed_precondition", "cancelled")
DENOISE_CODES: tuple[Code, ...] = tuple(code for code in STATUS if code not in _ELSEWHERE)
"""Errors that a caller of the denoising routes can be answered with."""


def problem_responses(*codes: Code) -> dict[int | str, dict[str, object]]:
    """OpenAPI documentation of the errors a route can answer with."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {STATUS[code]: {"description": TITLE[code], "content": content, **_MORE.get(code, {})} for code in codes}


def problem_of(error: ServiceError, request_id: str) -> Problem:
    return Problem(
        type=f"urn:rdt:problem:{error.code}",
        title=_title(error),
        status=STATUS[error.code],
        detail=error.message,
        errors=[BadField(field=bad.field, message=bad.message, value=bad.value) for bad in error.problems],
        request_id=request_id,
    )


def _title(error: ServiceError) -> str:
    title = TITLE_OF_REASON.get(error.reason) if isinstance(error, Refused) else None
    return title or TITLE[error.code]


def problem_response(error: ServiceError, request_id: str, scope: Scope) -> Response:
    headers = {}
    if isinstance(error, Refused):
        headers["Retry-After"] = str(error.retry_seconds)
        if error.reason == "draining":
            headers["Connection"] = "close"  # the next try should reach another server, by a new connection
    if error.code == "unauthenticated":
        headers["WWW-Authenticate"] = "Bearer"
    return _response(problem_of(error, request_id), headers, scope)


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    calls.note(error.code)
    return problem_response(error, request.state.request_id, request.scope)


async def on_http_error(request: Request, error: Exception) -> Response:
    """404, 405 and the like, which have no neutral code."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    problem = Problem(
        type="about:blank",
        title=phrase,
        status=error.status_code,
        detail=f"{request.method} {printable(request.url.path)}: {phrase.lower()}",
        errors=[],
        request_id=request.state.request_id,
    )
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":  # the only method of its route, which answers HEAD, too
        headers["Allow"] = "GET, HEAD"
    return _response(problem, headers, request.scope)


async def on_crash(request: Request, _error: Exception) -> Response:
    """A bug of ours. The server logs the traceback; the caller gets an id to quote."""
    response = problem_response(Internal(), request.state.request_id, request.scope)
    response.headers["X-Request-Id"] = request.state.request_id  # crashes are answered outside of `RequestId`
    return response


def route(scope: Scope) -> str:
    """The path below the one that the application is mounted under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _response(problem: Problem, headers: Mapping[str, str], scope: Scope) -> Response:
    document = problem.model_dump()
    if f"{route(scope)}/".startswith(f"{OPEN_INFERENCE}/"):
        document["error"] = problem.detail
    # Escaped to ASCII: whatever a caller sent, it can be written back.
    body = json.dumps(document, allow_nan=False)
    return Response(body, status_code=problem.status, media_type=PROBLEM_JSON, headers=headers)
