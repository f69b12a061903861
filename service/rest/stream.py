"""`POST /denoise/stream`: server-sent events, one after every pass, and the answer last.

    event: pass       a `DenoisePass`
    event: answer     the `DenoiseAnswer`; nothing follows it
    event: problem    instead of the answer, when it fails midway

The response begins with the first event, so whatever fails before it is an ordinary problem response.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from service import calls
from service.errors import Cancelled, Internal, ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.body import json_body, received
from service.rest.caller import unless_gone
from service.rest.denoise import EXAMPLE
from service.rest.errors import DENOISE_CODES, problem_of, problem_responses
from service.schema import DenoiseAnswer, DenoisePass, DenoiseRequest

log = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy must not buffer events

Event = DenoisePass | DenoiseAnswer
Events = AsyncGenerator[Event, None]


def add_routes(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    events_schema = {"type": "string", "description": "Events `pass` (DenoisePass), then `answer` or `problem`."}
    documented: dict[int | str, dict[str, object]] = {
        200: {"description": "Events", "content": {EVENT_STREAM: {"schema": events_schema}}}
    }

    @app.post(
        "/denoise/stream",
        summary="Restore a text and watch every pass",
        response_class=EventStream,
        status_code=200,
        responses={**problem_responses(*DENOISE_CODES), **documented},
        openapi_extra=json_body(DenoiseRequest.model_json_schema(), EXAMPLE),
    )
    async def denoise_stream(http_request: Request) -> Response:
        with metrics.failure("rest"):
            denoiser, fields = await received(http_request, lifecycle)
            request = denoiser.read(fields)
        events = denoiser.denoise_stream(request, "rest")
        first = await unless_gone(http_request, anext(events))
        return EventStream(http_request, first, events)


class EventStream(Response):
    """Sends events as they come. Notices at once when the caller leaves, also during a long pass."""

    media_type = EVENT_STREAM

    def __init__(self, request: Request, first: Event, events: Events) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the request's own
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for name, document in self._named():
                frame = f"event: {name}\ndata: {document.model_dump_json()}\n\n"  # JSON has no line breaks of its own
                await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(self._request, send_all())
        except Cancelled:
            calls.note("cancelled")
            log.debug("a caller left in the middle of a stream")
        finally:
            await self._events.aclose()

    async def _named(self) -> AsyncIterator[tuple[str, BaseModel]]:
        request_id = self._request.state.request_id
        try:
            yield _name(self._first), self._first
            async for event in self._events:
                yield _name(event), event
        except ServiceError as error:
            calls.note(error.code)
            yield "problem", problem_of(error, request_id)
        except Exception:
            calls.note("internal")
            log.exception("a stream failed")
            yield "problem", problem_of(Internal(), request_id)


def _name(event: Event) -> str:
    return "pass" if isinstance(event, DenoisePass) else "answer"
