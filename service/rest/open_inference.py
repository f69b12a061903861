"""The Open Inference Protocol over HTTP, below `/v2`: server, model, and inference."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse

from service.errors import Malformed, shown
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.open_inference import (
    EXTENSIONS,
    INPUT,
    OUTPUTS,
    PLATFORM,
    SERVER,
    Datatype,
    Inference,
    Tensor,
    model_named,
    read_inference,
)
from service.rest.body import JSON_TYPE, json_body, json_of, read_body
from service.rest.caller import unless_gone
from service.rest.errors import DENOISE_CODES, problem_responses
from service.schema import ModelCard
from service.version import release

LIVE_PATH = "/v2/health/live"
READY_PATH = "/v2/health/ready"
MODEL_PATHS = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")

BINARY_TYPE = "application/octet-stream"
BINARY: dict[str, object] = {BINARY_TYPE: {"schema": {"type": "string", "format": "binary"}}}
"""For the OpenAPI document."""
MEDIA_TYPES = (JSON_TYPE, BINARY_TYPE, "")
"""Some clients name no type."""
JSON_SIZE = "inference-header-content-length"
"""The header that says how many bytes the JSON has, if binary tensors follow it."""
SIZE = "binary_data_size"
"""The parameter of such a tensor that says how many bytes it has."""

EXAMPLE = {
    "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["The king of [MASK] was killed ."]}],
    "parameters": {"max_steps": 2},
}


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class ServerMetadata(BaseModel):
    name: str = SERVER
    version: str
    extensions: list[str] = list(EXTENSIONS)


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int] = [-1]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str = PLATFORM
    inputs: list[TensorMetadata] = [TensorMetadata(name=INPUT, datatype="BYTES")]
    outputs: list[TensorMetadata] = [TensorMetadata(name=name, datatype=kind) for name, (kind, _) in OUTPUTS.items()]


class OutputTensor(BaseModel):
    """Its data is here, or `binary_data_size` bytes of it follow the JSON."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[str | int | float] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def add_routes(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    refusal = problem_responses("unauthenticated")

    @app.get("/v2", summary="The server", response_model=ServerMetadata, responses=refusal)
    async def server(_: Request) -> Response:
        return _written(ServerMetadata(version=release()))

    @app.get(LIVE_PATH, summary="The process is up", response_model=Live)
    async def live(_: Request) -> Response:
        return _written(Live(live=True))

    @app.get(READY_PATH, summary="Requests are taken", response_model=Ready, responses={503: {"model": Ready}})
    async def ready(_: Request) -> Response:
        takes_requests = lifecycle.state == "ready"
        return JSONResponse({"ready": takes_requests}, status_code=200 if takes_requests else 503)

    for path in MODEL_PATHS:
        _add_model_routes(app, path, lifecycle, metrics)


def _add_model_routes(app: FastAPI, path: str, lifecycle: Lifecycle, metrics: Metrics) -> None:
    refusals = problem_responses("unauthenticated", "not_found", "unavailable")
    named: dict[str, object] = {"parameters": _path_parameters(path)}
    body = json_body({"$ref": "#/components/schemas/InferRequest"}, EXAMPLE, BINARY)

    @app.get(path, summary="The model", response_model=ModelMetadata, responses=refusals, openapi_extra=named)
    async def model(request: Request) -> Response:
        card = model_named(lifecycle, *_asked(request)).card
        return _written(ModelMetadata(name=card.name, versions=[card.version]))

    @app.get(
        f"{path}/ready",
        summary="The model takes requests",
        response_model=ModelReady,
        responses=refusals,
        openapi_extra=named,
    )
    async def model_ready(request: Request) -> Response:
        return _written(ModelReady(name=model_named(lifecycle, *_asked(request)).card.name, ready=True))

    @app.post(
        f"{path}/infer",
        summary="Restore many texts, if none of them fails",
        description="Tensors may be in binary form. They then follow the JSON, whose length is in the header "
        "`Inference-Header-Content-Length`, of the request and of the answer.",
        response_model=InferResponse,
        responses={**problem_responses(*DENOISE_CODES, "not_found"), 200: {"content": BINARY}},
        openapi_extra={**named, **body},
    )
    async def infer(request: Request) -> Response:
        with metrics.failure("rest"):
            model_named(lifecycle, *_asked(request))  # before anything is read
            fields = await _fields(request)
            denoiser = model_named(lifecycle, *_asked(request))  # the model may have been reloaded meanwhile
            inference = read_inference(fields, denoiser)
        del fields
        outputs = await unless_gone(request, inference.answered_by(denoiser, "rest"))
        return _infer_response(inference, outputs, denoiser.card)


def _asked(request: Request) -> tuple[str, str]:
    """Name and version of the model that is asked for."""
    return request.path_params["name"], request.path_params.get("version", "")


async def _fields(request: Request) -> object:
    """The request, with binary tensors that follow its JSON in their places. Raises as `read_json` does."""
    body = await read_body(request, *MEDIA_TYPES)
    size = request.headers.get(JSON_SIZE, str(len(body)))
    if not (size.isdecimal() and len(size) < 10 and int(size) <= len(body)):
        raise Malformed(f"{JSON_SIZE} is {shown(size)}: want a whole number up to {len(body)}, the size of the body")
    place = int(size)
    fields = json_of(request, body[:place])
    inputs = fields.get("inputs") if isinstance(fields, dict) else None
    for tensor in inputs if isinstance(inputs, list) else ():
        parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
        n_bytes = parameters.get(SIZE) if isinstance(parameters, dict) else None
        if type(n_bytes) is int and 0 <= n_bytes <= len(body) - place:
            tensor["data"] = body[place : place + n_bytes]
            place += n_bytes
    if place < len(body):
        raise Malformed(f"{len(body) - place} bytes of the body belong to no tensor")
    return fields


def _infer_response(inference: Inference, outputs: Sequence[Tensor], card: ModelCard) -> Response:
    written, binary = [], []
    for tensor in outputs:
        output = OutputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        written.append(output)
        if tensor.name in inference.binary:
            binary.append(tensor.raw)
            output.parameters = {SIZE: len(binary[-1])}
        else:
            output.data = tensor.data
    answer = InferResponse(model_name=card.name, model_version=card.version, id=inference.id, outputs=written)
    if not binary:
        return _written(answer)
    head = answer.model_dump_json(exclude_none=True).encode()
    return Response(head + b"".join(binary), headers={JSON_SIZE: str(len(head))}, media_type=BINARY_TYPE)


def _path_parameters(path: str) -> list[dict[str, object]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _written(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), media_type=JSON_TYPE)
