"""`POST /denoise`: one text, one answer."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.body import JSON_TYPE, json_body, received
from service.rest.caller import unless_gone
from service.rest.errors import DENOISE_CODES, problem_responses
from service.schema import DenoiseAnswer, DenoiseRequest

EXAMPLE = {"text": "He was [MASK] in New [MASK] .", "top_k": 3}


def add_routes(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    @app.post(
        "/denoise",
        summary="Restore the masked tokens of a text",
        response_model=DenoiseAnswer,
        responses=problem_responses(*DENOISE_CODES),
        openapi_extra=json_body(DenoiseRequest.model_json_schema(), EXAMPLE),
    )
    async def denoise(http_request: Request) -> Response:
        with metrics.failure("rest"):
            denoiser, fields = await received(http_request, lifecycle)
            request = denoiser.read(fields)
        answer = await unless_gone(http_request, denoiser.denoise(request, "rest"))
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)
