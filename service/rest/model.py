"""`GET /model`: which model is served, and what it accepts."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from service.lifecycle import Lifecycle
from service.rest.body import JSON_TYPE
from service.rest.errors import problem_responses
from service.schema import ModelCard


def add_routes(app: FastAPI, lifecycle: Lifecycle) -> None:
    @app.get(
        "/model",
        summary="The model being served",
        response_model=ModelCard,
        responses=problem_responses("unauthenticated", "unavailable"),
    )
    async def model(_: Request) -> Response:
        return Response(lifecycle.denoiser.card.model_dump_json(), media_type=JSON_TYPE)
