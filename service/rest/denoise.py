"""`POST /denoise`: one text, one answer."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.body import JSON_TYPE, json_body, read_json
from service.rest.caller import unless_gone
from service.rest.errors import DENOISE_CODES, problem_responses
from service.schema import DenoiseAnswer, DenoiseRequest

EXAMPLE = {"text": "The quick brown [MASK] jumps over the lazy [MASK].", "max_steps": 20}


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
            lifecycle.check()  # before anything is read
            fields = await read_json(http_request)
            denoiser = lifecycle.denoiser  # a reload may have come while the body did
            request = denoiser.read(fields)
        answer = await unless_gone(http_request, denoiser.denoise(request, "rest"))
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)
