"""The Open Inference Protocol over gRPC: `inference.GRPCInferenceService`. Bytes in, bytes out, as in `rpc.denoise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import grpc

from service.errors import Malformed, Unavailable
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
from service.rpc.convert import INFERENCE_SERVICE, parse
from service.rpc.denoise import cut_at, seconds_left
from service.rpc.errors import Context, mapped_errors
from service.rpc.pb import open_inference_pb2 as pb
from service.schema import ModelCard
from service.version import release

FRACTIONS = {"threshold", "mask_ratio"}
"""Parameters that may be strings: KServe's client knows none that are numbers with a point."""
CONTENTS: Mapping[Datatype, str] = {"BYTES": "bytes_contents", "INT32": "int_contents", "FP32": "fp32_contents"}


class InferenceCalls:
    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, max_message_bytes: int) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes

    def handler(self) -> grpc.GenericRpcHandler:
        calls = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
        }
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()
        }
        return grpc.method_handlers_generic_handler(INFERENCE_SERVICE, handlers)

    async def server_live(self, _message: bytes, _context: Context) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, _message: bytes, _context: Context) -> bytes:
        return pb.ServerReadyResponse(ready=self._lifecycle.state == "ready").SerializeToString()

    async def server_metadata(self, _message: bytes, _context: Context) -> bytes:
        return pb.ServerMetadataResponse(name=SERVER, version=release(), extensions=EXTENSIONS).SerializeToString()

    async def model_ready(self, message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            request = parse(pb.ModelReadyRequest, message, self._max_message_bytes)
            try:
                model_named(self._lifecycle, request.name, request.version)
            except Unavailable:
                return pb.ModelReadyResponse(ready=False).SerializeToString()
            return pb.ModelReadyResponse(ready=True).SerializeToString()

    async def model_metadata(self, message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            request = parse(pb.ModelMetadataRequest, message, self._max_message_bytes)
            return to_metadata(model_named(self._lifecycle, request.name, request.version).card).SerializeToString()

    async def model_infer(self, message: bytes, context: Context) -> bytes:
        async with mapped_errors(context):
            with self._metrics.failure("grpc"):
                self._lifecycle.check()  # before anything is read
                request = parse(pb.ModelInferRequest, message, self._max_message_bytes)
                denoiser = model_named(self._lifecycle, request.model_name, request.model_version)
                inference = read_inference(infer_fields(request), denoiser)
            outputs = await inference.answered_by(denoiser, "grpc", seconds_left(context), cut_at(context))
            raw = len(request.raw_input_contents) > 0
            return to_infer_response(denoiser.card, inference, outputs, raw=raw).SerializeToString()


def infer_fields(request: pb.ModelInferRequest) -> dict[str, object]:
    """The request as plain values, as JSON has it. Raises `Malformed` if raw contents do not fit the inputs."""
    raw, inputs = request.raw_input_contents, request.inputs
    if raw and (len(raw) != len(inputs) or any(tensor.HasField("contents") for tensor in inputs)):
        raise Malformed(f"raw_input_contents has {len(raw)} parts: want one for each of {len(inputs)} inputs, or none")
    datas: Sequence[object] = raw or [list(tensor.contents.bytes_contents) for tensor in inputs]
    return {
        "id": request.id,
        "parameters": _values(request.parameters),
        "inputs": [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": data}
            for tensor, data in zip(inputs, datas, strict=True)
        ],
        "outputs": [{"name": output.name} for output in request.outputs],
    }


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, object]:
    chosen = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    values = {name: kind and getattr(parameters[name], kind) for name, kind in chosen.items()}
    for name, value in values.items():
        if name in FRACTIONS and isinstance(value, str):
            with suppress(ValueError):
                values[name] = float(value)
    return values


def to_metadata(card: ModelCard) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=card.name,
        versions=[card.version],
        platform=PLATFORM,
        inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1])],
        outputs=[tensor(name=name, datatype=datatype, shape=[-1]) for name, (datatype, _) in OUTPUTS.items()],
    )


def to_infer_response(
    card: ModelCard, inference: Inference, outputs: Sequence[Tensor], *, raw: bool
) -> pb.ModelInferResponse:
    """With `raw` the data is in `raw_output_contents`."""
    response = pb.ModelInferResponse(model_name=card.name, model_version=card.version, id=inference.id)
    for tensor in outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            response.raw_output_contents.append(tensor.raw)
        else:
            values = [value.encode() if isinstance(value, str) else value for value in tensor.data]
            getattr(output.contents, CONTENTS[tensor.datatype]).extend(values)
    return response
