"""`/health/live`: whether the process answers. `/health/ready`: whether it takes requests, and if not, why."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from service.lifecycle import Lifecycle, State

LIVE_PATH = "/health/live"
READY_PATH = "/health/ready"


class Liveness(BaseModel):
    status: Literal["live"] = "live"


class Readiness(BaseModel):
    status: State


def add_routes(app: FastAPI, lifecycle: Lifecycle) -> None:
    @app.get(LIVE_PATH, summary="The process is up", response_model=Liveness)
    async def live(_: Request) -> JSONResponse:
        return JSONResponse(Liveness().model_dump())

    @app.get(READY_PATH, summary="Requests are taken", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready(_: Request) -> JSONResponse:
        state = lifecycle.state
        return JSONResponse(Readiness(status=state).model_dump(), status_code=200 if state == "ready" else 503)
