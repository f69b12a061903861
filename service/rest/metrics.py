"""`GET /metrics`: everything Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.metrics import Metrics


def routes(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", summary="Metrics in Prometheus' text format")
    async def scrape() -> Response:
        return Response(await metrics.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
