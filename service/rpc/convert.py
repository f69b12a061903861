"""Converts between messages and the plain values and answers that every transport shares."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct

from service.errors import Malformed, ServiceError, TooLarge
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb import open_inference_pb2
from service.schema import DenoiseAnswer, DenoisePass, ModelCard

DENOISER = pb.DESCRIPTOR.services_by_name["Denoiser"]
INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE, INFERENCE_SERVICE = DENOISER.full_name, INFERENCE.full_name
SERVICES = (SERVICE, INFERENCE_SERVICE)
"""Those that restore texts."""

Parsed = TypeVar("Parsed", bound=Message)


def parse(kind: type[Parsed], message: bytes, max_bytes: int) -> Parsed:
    """Raises `TooLarge` and `Malformed`; with gRPC's own parsing, the status would blame the server."""
    if len(message) > max_bytes:
        raise TooLarge(f"the message is larger than {max_bytes} bytes")
    try:
        return kind.FromString(message)
    except DecodeError:
        raise Malformed(f"the message is not a {kind.DESCRIPTOR.full_name}") from None


def request_fields(request: pb.DenoiseRequest) -> dict[str, object]:
    """What was set, under the names of the JSON interface. A text that was not sent is an empty one."""
    return {"text": request.text, **_set_fields(request)}


def batch_fields(batch: pb.DenoiseBatchRequest) -> dict[str, object]:
    return {"items": [request_fields(item) for item in batch.items], **_set_fields(batch.options)}


def to_response(answer: DenoiseAnswer) -> pb.DenoiseResponse:
    return pb.DenoiseResponse(**answer.model_dump(exclude_none=True))


def to_event(event: DenoisePass | DenoiseAnswer) -> pb.DenoiseEvent:
    if isinstance(event, DenoiseAnswer):
        return pb.DenoiseEvent(answer=to_response(event))
    return pb.DenoiseEvent(**{"pass": event.model_dump()})  # `pass` is a keyword


def to_result(end: DenoiseAnswer | ServiceError) -> pb.BatchResult:
    if isinstance(end, DenoiseAnswer):
        return pb.BatchResult(answer=to_response(end))
    errors = [pb.FieldProblem(field=problem.field, message=problem.message) for problem in end.problems]
    return pb.BatchResult(problem=pb.Problem(code=end.code, message=end.message, errors=errors))


def to_model(card: ModelCard) -> pb.GetModelResponse:
    configuration = ParseDict(card.configuration, Struct())
    return pb.GetModelResponse(**{**card.model_dump(), "configuration": configuration})


def _set_fields(message: Message) -> dict[str, object]:
    return {field.name: value for field, value in message.ListFields()}
