"""Puts the HTTP interface together. Nothing happens at import; tests build as many apps as they like."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from service.access import ApiKey
from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest import batch, denoise, health, metrics, model, playground, stream
from service.rest.errors import on_crash, on_http_error, on_service_error
from service.rest.middleware import BodyLimit, Door, RequestId
from service.rest.observe import Observer
from service.rest.problem import Problem
from service.rest.reload import PATH, Change
from service.rest.reload import routes as reload_routes
from service.schema import DenoisePass
from service.tracing import NO_TRACER, Tracer


def create_app(
    lifecycle: Lifecycle,
    measures: Metrics,
    *,
    max_body_bytes: int,
    api_key: str | None = None,
    admin_key: str | None = None,
    reload: Callable[[], Awaitable[Change]] | None = None,
    tracer: Tracer = NO_TRACER,
) -> FastAPI:
    """An ASGI application over a server's lifecycle. With `api_key`, only health and the playground stay open.

    `reload` can be asked for only with `admin_key`, and without one not at all.
    """
    # The bundled documentation pages load scripts from elsewhere; the schema itself stays at /openapi.json.
    app = FastAPI(title="RDT", version=_version(), docs_url=None, redoc_url=None)
    for room in (denoise, batch, stream):
        app.include_router(room.routes(lifecycle, measures))
    app.include_router(health.routes(lifecycle))
    app.include_router(metrics.routes(measures))
    app.include_router(model.routes(lifecycle))
    app.include_router(playground.routes())
    if admin_key is not None and reload is not None:
        app.include_router(reload_routes(reload, ApiKey(admin_key)))

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_crash)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_key is not None:
        open_paths = (health.LIVE_PATH, health.READY_PATH, playground.PATH, PATH)  # the last asks for its own key
        app.add_middleware(Door, key=ApiKey(api_key), open_paths=open_paths, metrics=measures)
    if tracer is not NO_TRACER or logging.getLogger(Observer.__module__).isEnabledFor(logging.DEBUG):
        app.add_middleware(Observer, tracer=tracer)
    app.add_middleware(RequestId)  # added last, runs first
    _document_components(app)
    return app


def _document_components(app: FastAPI) -> None:
    """Put into the schema's components what the routes refer to and FastAPI does not see."""
    components = app.openapi()["components"]["schemas"]  # built once and kept by FastAPI
    for document in (Problem, DenoisePass):
        schema = document.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(schema.pop("$defs", {}))
        components[document.__name__] = schema


def _version() -> str:
    try:
        return version("rdt")
    except PackageNotFoundError:  # run from a checkout
        return "0"
