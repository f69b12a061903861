"""`GET /model`: which model is served, and what it accepts."""

from __future__ import annotations

from fastapi import APIRouter

from service.lifecycle import Lifecycle
from service.rest.errors import problem_responses
from service.schema import ModelCard


def routes(lifecycle: Lifecycle) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/model", summary="The model being served", responses=problem_responses("unauthenticated", "unavailable")
    )
    async def model() -> ModelCard:
        return lifecycle.denoiser.card

    return router
