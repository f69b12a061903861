"""Puts the HTTP interface together. Nothing happens at import; tests build as many apps as they like."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest import denoise, health, metrics, model, playground
from service.rest.errors import on_crash, on_http_error, on_service_error
from service.rest.middleware import ApiKey, BodyLimit, RequestId
from service.rest.problem import Problem


def create_app(lifecycle: Lifecycle, measures: Metrics, *, max_body_bytes: int, api_key: str | None = None) -> FastAPI:
    """An ASGI application over a server's lifecycle. With `api_key`, only the health routes stay open."""
    # The bundled documentation pages load scripts from elsewhere; the schema itself stays at /openapi.json.
    app = FastAPI(title="RDT", version=_version(), docs_url=None, redoc_url=None)
    app.include_router(denoise.routes(lifecycle, measures))
    app.include_router(health.routes(lifecycle))
    app.include_router(metrics.routes(measures))
    app.include_router(model.routes(lifecycle))
    app.include_router(playground.routes())

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_crash)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key, open_paths=(health.LIVE_PATH, health.READY_PATH))
    app.add_middleware(RequestId)  # added last, runs first
    _document_problems(app)
    return app


def _document_problems(app: FastAPI) -> None:
    """Put the problem document into the schema's components, where the routes refer to it."""
    components = app.openapi()["components"]["schemas"]  # built once and kept by FastAPI
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.update(problem.pop("$defs"))
    components["Problem"] = problem


def _version() -> str:
    try:
        return version("rdt")
    except PackageNotFoundError:  # run from a checkout
        return "0"
