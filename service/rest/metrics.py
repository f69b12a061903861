"""`GET /metrics`: everything Prometheus scrapes."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse

from service.metrics import Metrics
from service.rest.errors import problem_responses


def add_routes(app: FastAPI, metrics: Metrics) -> None:
    @app.get(
        "/metrics",
        summary="Metrics in Prometheus' text format",
        response_class=PlainTextResponse,
        responses=problem_responses("unauthenticated", "unavailable"),
    )
    async def scrape(_: Request) -> Response:
        return Response(await metrics.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})
