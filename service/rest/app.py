"""Puts the HTTP interface together. Nothing happens at import; tests build as many apps as they like."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from service.access import ApiKey
from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.open_inference import InferRequest
from service.rest import batch, denoise, health, metrics, model, open_inference, playground, stream
from service.rest.errors import on_crash, on_http_error, on_service_error
from service.rest.middleware import BodyLimit, Door, RequestId
from service.rest.observe import Observer
from service.rest.problem import Problem
from service.rest.reload import PATH, Change
from service.rest.reload import add_routes as add_reload_routes
from service.schema import DenoisePass
from service.tracing import NO_TRACER, Tracer
from service.version import release


class PlainRoute(APIRoute):
    """Documents an endpoint, and passes it the plain request. Every endpoint here reads its request and writes its
    response itself; FastAPI's handling of arguments and response models would take longer than all of that.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """HEAD is handled as GET; the server leaves the body out."""
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


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
    # No documentation pages: they load scripts from elsewhere. The schema itself stays at /openapi.json.
    # No redirects: behind a proxy they would name the wrong address, and callers send their keys wherever they lead.
    # No telemetry of the framework: where OpenTelemetry is set up, it would come on top of our own.
    app = FastAPI(
        title="RDT", version=release(), docs_url=None, redoc_url=None, redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )  # fmt: skip
    app.router.route_class = PlainRoute
    for routes in (denoise, batch, stream, open_inference):
        routes.add_routes(app, lifecycle, measures)
    health.add_routes(app, lifecycle)
    metrics.add_routes(app, measures)
    model.add_routes(app, lifecycle)
    playground.add_routes(app)
    if admin_key is not None and reload is not None:
        add_reload_routes(app, reload, ApiKey(admin_key))

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_crash)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    probes = (health.LIVE_PATH, health.READY_PATH, open_inference.LIVE_PATH, open_inference.READY_PATH)
    open_paths = (*probes, playground.PATH, PATH)  # the last has a key of its own
    if api_key is not None:
        app.add_middleware(Door, key=ApiKey(api_key), open_paths=open_paths, metrics=measures)
    if tracer is not NO_TRACER or logging.getLogger(Observer.__module__).isEnabledFor(logging.DEBUG):
        app.add_middleware(Observer, tracer=tracer)
    app.add_middleware(RequestId)  # added last, runs first
    _document_bodies(app)
    _document_components(app)
    _document_keys(app, (PATH,) if api_key is None else set(app.openapi()["paths"]) - set(open_paths) | {PATH})
    return app


def _document_bodies(app: FastAPI) -> None:
    """Write the request bodies again, as declared: FastAPI makes floats of bounds, which 2**63 - 1 does not survive."""
    paths = app.openapi()["paths"]  # built once and kept by FastAPI
    for route in app.routes:
        if isinstance(route, PlainRoute) and route.openapi_extra:
            for method in route.methods or ():
                paths[route.path][method.lower()].update(route.openapi_extra)


def _document_components(app: FastAPI) -> None:
    """Add the schemas that routes refer to and FastAPI does not see."""
    components = app.openapi()["components"]["schemas"]
    for document in (Problem, DenoisePass, InferRequest):
        schema = document.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(schema.pop("$defs", {}))
        components[document.__name__] = schema


def _document_keys(app: FastAPI, paths: Collection[str]) -> None:
    """Declare that these paths ask for a key, in either of the two headers."""
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path in set(paths) & set(schema["paths"]):
        for operation in schema["paths"][path].values():
            operation["security"] = [{"bearer": []}, {"key": []}]
