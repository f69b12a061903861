"""`POST /denoise`: one text, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from service.errors import Cancelled
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.body import JSON_TYPE, read_json
from service.rest.errors import problem_responses
from service.schema import DenoiseAnswer, DenoiseRequest

Value = TypeVar("Value")

EXAMPLE = {"text": "The quick brown [MASK] jumps over the lazy [MASK].", "max_steps": 20}


def routes(lifecycle: Lifecycle, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    body = {"schema": DenoiseRequest.model_json_schema(), "example": EXAMPLE}

    @router.post(
        "/denoise",
        summary="Restore the masked tokens of a text",
        response_model=DenoiseAnswer,
        responses=problem_responses(
            "malformed", "unauthenticated", "too_large", "unsupported_format", "invalid_argument",
            "resource_exhausted", "internal", "unavailable", "deadline_exceeded",
        ),
        openapi_extra={"requestBody": {"required": True, "content": {JSON_TYPE: body}}},
    )  # fmt: skip
    async def denoise(http_request: Request) -> Response:
        with metrics.failure("rest"):
            denoiser = lifecycle.denoiser
            request = denoiser.read(await read_json(http_request))
        answer = await unless_gone(http_request, denoiser.denoise(request, "rest"))
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)

    return router


async def unless_gone(http_request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of the work; if the caller hangs up first, the work is cancelled (`Cancelled`)."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http_request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the caller left before the answer")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
