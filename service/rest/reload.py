"""`POST /model/reload`: take in the checkpoint file again. It exists only on servers with an admin key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from service.access import ApiKey
from service.errors import Unavailable
from service.rest.body import JSON_TYPE
from service.rest.errors import problem_responses
from service.rest.middleware import present_key

PATH = "/model/reload"


class Change(Protocol):
    """What a reload came to."""

    @property
    def outcome(self) -> Literal["swapped", "unchanged"]: ...

    @property
    def previous(self) -> str: ...

    @property
    def model(self) -> str: ...


class ReloadAnswer(BaseModel):
    outcome: Literal["swapped", "unchanged"] = Field(description="`unchanged`: the file holds the model being served.")
    previous: str = Field(description="The model that was served before.")
    model: str = Field(description="The model that is served now.")


def add_routes(app: FastAPI, reload: Callable[[], Awaitable[Change]], admin_key: ApiKey) -> None:
    @app.post(
        PATH,
        summary="Load the checkpoint file again, and serve it",
        description="Requests accepted before finish on the old model; a file that cannot be served changes nothing.",
        response_model=ReloadAnswer,
        responses=problem_responses("unauthenticated", "failed_precondition", "unavailable"),
    )
    async def reload_model(http_request: Request) -> Response:
        present_key(http_request.headers, admin_key)
        try:
            change = await reload()
        except asyncio.CancelledError:  # by the end of the server, and by nothing else
            raise Unavailable.draining() from None
        answer = ReloadAnswer(outcome=change.outcome, previous=change.previous, model=change.model)
        return Response(answer.model_dump_json(), media_type=JSON_TYPE)
