"""`POST /denoise/batch`: many texts; items fail one by one."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.body import JSON_TYPE, json_body, received
from service.rest.caller import unless_gone
from service.rest.errors import DENOISE_CODES, problem_of, problem_responses
from service.rest.problem import BatchAnswer, BatchResult
from service.schema import OPTIONS, DenoiseAnswer, DenoiseRequest

EXAMPLE = {
    "items": [{"text": "He was [MASK] in New [MASK] ."}, {"text": "The king of [MASK] was killed .", "top_k": 3}],
    "max_steps": 2,
}
CODES = tuple(code for code in DENOISE_CODES if code != "deadline_exceeded")  # which only items end with


def add_routes(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    @app.post(
        "/denoise/batch",
        summary="Restore many texts",
        response_model=BatchAnswer,
        responses=problem_responses(*CODES),
        openapi_extra=json_body(request_schema(), EXAMPLE),
    )
    async def denoise_batch(http_request: Request) -> Response:
        with metrics.failure("rest"):
            denoiser, fields = await received(http_request, lifecycle)
            items = denoiser.read_batch(fields)
        del fields  # a megabyte of JSON may be thirty of values, and a bad item's are of no more use
        ends = await unless_gone(http_request, denoiser.denoise_batch(items, "rest"))
        answer = BatchAnswer(results=[_result(end, http_request.state.request_id) for end in ends])
        return Response(answer.model_dump_json(exclude_unset=True), media_type=JSON_TYPE)


def request_schema() -> dict[str, object]:
    """Items, and beside them the options they share."""
    item = DenoiseRequest.model_json_schema()
    items = {"type": "array", "minItems": 1, "items": item, "description": "`GET /model` says how many at the most."}
    return {
        "title": "BatchRequest",
        "description": "Many texts to restore. Options beside `items` are those of every item that has not its own.",
        "type": "object",
        "required": ["items"],
        "properties": {"items": items, **{name: item["properties"][name] for name in OPTIONS}},
        "additionalProperties": False,
    }


def _result(end: DenoiseAnswer | ServiceError, request_id: str) -> BatchResult:
    if isinstance(end, ServiceError):
        return BatchResult(problem=problem_of(end, request_id))
    return BatchResult(answer=end)
