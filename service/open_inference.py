"""The Open Inference Protocol, version 2, in terms of the use case: what KServe, Triton and their clients speak.

A request is a batch. Its input is one tensor of texts, and its parameters are options of them all. The outputs have the
shape of the input. The protocol knows no error of a single text, so the first text that fails is the answer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.denoiser import Denoiser
from service.errors import MAX_SHOWN_PROBLEMS, FieldProblem, InvalidArgument, NotFound, ServiceError, shown
from service.lifecycle import Lifecycle
from service.metrics import Transport
from service.schema import OPTIONS, BatchItem, DenoiseAnswer, ModelCard, unknown_fields

Datatype = Literal["BYTES", "INT32", "FP32"]
Value = str | int | float

SERVER = "rdt"
PLATFORM = "pytorch_rdt"
EXTENSIONS = ("binary_tensor_data",)

INPUT = "text"
OUTPUTS: Mapping[str, tuple[Datatype, Callable[[DenoiseAnswer], Value]]] = {
    "text": ("BYTES", lambda answer: answer.text),
    "steps": ("INT32", lambda answer: answer.steps),
    "halt_reason": ("BYTES", lambda answer: answer.halt_reason),
    "level": ("FP32", lambda answer: answer.level),
    "answer": ("BYTES", lambda answer: answer.model_dump_json()),
}
"""Each output's type, and its value for a text. `answer` is all that `POST /denoise` answers, as JSON."""

BINARY = "binary_data_output"
"""The parameter that asks for all outputs in binary form; of a single output it is `binary_data`."""

DATA = "inputs[0].data"
MOST_DIMENSIONS = 8
LARGEST_DIMENSION = 2**31 - 1


class InputTensor(BaseModel):
    """The texts. Parameters say how they are written: `binary_data_size`, where they follow the JSON in binary form."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Literal["text"]
    shape: list[Annotated[int, Field(ge=0, le=LARGEST_DIMENSION)]] = Field(
        max_length=MOST_DIMENSIONS, description="As many as there are texts: `[2]`, or `[2, 1]`."
    )
    datatype: Literal["BYTES"]
    parameters: dict[str, Any] | None = None
    data: Any = Field(description="An array of strings, or of such arrays.")


class RequestedOutput(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Literal["text", "steps", "halt_reason", "level", "answer"]
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Texts to restore. `parameters` are the options of `POST /denoise`, the same for all of them, and
    `binary_data_output`, as which outputs are sent unless `binary_data` among their own parameters says otherwise.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str | None = None
    model_name: str | None = Field(default=None, description="Once more, as KServe's client sends it.")
    model_version: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(
        default=None, max_length=len(OUTPUTS), description="Those to send: all, if none is named."
    )

    @field_validator("id")
    @classmethod
    def _can_be_sent_back(cls, id_: str | None) -> str | None:
        (id_ or "").encode()  # a UnicodeEncodeError is a ValueError
        return id_


WANTED = {
    "id": "a string without lone surrogates",
    "model_name": "a string",
    "model_version": "a string",
    "parameters": "an object",
    "inputs": f"an array of one tensor, {INPUT}",
    "inputs.name": INPUT,
    "inputs.shape": f"an array of at most {MOST_DIMENSIONS} whole numbers",
    "inputs.datatype": "BYTES",
    "inputs.parameters": "an object",
    "inputs.data": "an array of strings",
    "outputs": f"an array of at most {len(OUTPUTS)} objects with the field name",
    "outputs.name": f"one of {', '.join(OUTPUTS)}",
    "outputs.parameters": "an object",
}


@dataclass(frozen=True)
class Tensor:
    """An output: one value for each text."""

    name: str
    datatype: Datatype
    shape: list[int]
    data: list[Value]

    @property
    def raw(self) -> bytes:
        """The data in binary form."""
        if self.datatype == "BYTES":
            return packed([str(value) for value in self.data])
        return struct.pack(f"<{len(self.data)}{'i' if self.datatype == 'INT32' else 'f'}", *self.data)


@dataclass(frozen=True)
class Inference:
    """A valid request."""

    id: str | None
    items: Sequence[BatchItem]
    shape: list[int]
    outputs: Sequence[str]
    binary: Collection[str]  # of the outputs, those to be sent in binary form

    async def answered_by(
        self,
        denoiser: Denoiser,
        transport: Transport,
        seconds_left: float | None = None,
        cut_at: float | None = None,
    ) -> list[Tensor]:
        """Takes the time that `Denoiser.denoise_batch` takes. Raises what the first text that fails has failed with."""
        answers = []
        for end in await denoiser.denoise_batch(self.items, transport, seconds_left, cut_at, items_at=DATA):
            if isinstance(end, ServiceError):
                raise end
            answers.append(end)
        return [self._output(name, answers) for name in self.outputs]

    def _output(self, name: str, answers: Sequence[DenoiseAnswer]) -> Tensor:
        datatype, value = OUTPUTS[name]
        return Tensor(name, datatype, self.shape, [value(answer) for answer in answers])


def model_named(lifecycle: Lifecycle, name: str, version: str) -> Denoiser:
    """What serves this model; an empty version is any. Raises `NotFound`, and `Unavailable` unless ready."""
    denoiser = lifecycle.denoiser
    check_name(denoiser.card, name, version)
    return denoiser


def check_name(card: ModelCard, name: str, version: str) -> None:
    """Raises `NotFound`."""
    if name != card.name or version not in ("", card.version):
        asked = f"{shown(name)}, version {shown(version)}" if version else shown(name)
        raise NotFound(f"there is no model {asked}: want {card.name}, version {card.version}")


def read_inference(fields: object, denoiser: Denoiser) -> Inference:
    """Plain values, as decoded from JSON -> a request. Each text may also be bytes, or all together (see `unpacked`).

    Raises `InvalidArgument` naming bad fields, and `NotFound`.
    """
    if not isinstance(fields, Mapping):
        raise InvalidArgument(f"the request is {shown(fields)}: want an object with the field inputs")
    try:
        request = InferRequest.model_validate(fields)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        problems = [_problem(fault) for fault in faults[:MAX_SHOWN_PROBLEMS]]
        raise InvalidArgument.of(problems + problems[-1:] * (len(faults) - len(problems))) from None
    check_name(denoiser.card, request.model_name or denoiser.card.name, request.model_version or "")
    options = dict(request.parameters or {})
    all_binary = options.pop(BINARY, False)
    others = {f"parameters.{name}": value for name, value in options.items() if name not in OPTIONS}
    if others:
        raise InvalidArgument.of(unknown_fields(others, OPTIONS))
    texts, shape = _texts(request.inputs[0].data, denoiser.limits.max_batch_items), request.inputs[0].shape
    if math.prod(shape) != len(texts):
        raise _bad("inputs[0].shape", f"is {shape}, and data has {len(texts)} texts: want as many", str(shape))
    items = denoiser.read_batch({"items": [{"text": text} for text in texts], **options}, "parameters", DATA)
    for item in items:
        if isinstance(item, ServiceError):
            raise item
    asked: dict[str, dict[str, Any]] = {output.name: output.parameters or {} for output in request.outputs or ()}
    outputs = list(asked or OUTPUTS)
    binary = {name for name in outputs if asked.get(name, {}).get("binary_data", all_binary) is True}
    return Inference(request.id, items, shape, outputs, binary)


def _texts(data: object, most: int) -> list[str]:
    """The strings of a tensor in order, whatever its shape."""
    values = unpacked(data, most) if isinstance(data, bytes) else data
    if not isinstance(values, list):
        raise InvalidArgument.of([FieldProblem.of(DATA, values, WANTED["inputs.data"])])
    for _ in range(MOST_DIMENSIONS):
        if any(isinstance(value, list) for value in values):
            values = [inner for value in values for inner in (value if isinstance(value, list) else [value])]
    if not 1 <= len(values) <= most:
        raise _bad(DATA, f"has {len(values)} texts: want 1 to {most}", len(values))
    return [_text(value, f"{DATA}[{index}]") for index, value in enumerate(values)]


def _text(value: object, path: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _bad(path, f"is not UTF-8: byte {error.start} is {value[error.start]:#04x}") from None
    if not isinstance(value, str):
        raise InvalidArgument.of([FieldProblem.of(path, value, "a string")])
    return value


def packed(strings: Sequence[str]) -> bytes:
    """Strings in one piece: before each of them how many bytes it has, in four bytes, the lowest first."""
    encoded = [string.encode() for string in strings]
    return b"".join(len(one).to_bytes(4, "little") + one for one in encoded)


def unpacked(raw: bytes, most: int) -> list[bytes]:
    """The opposite of `packed`. Raises `InvalidArgument` if the bytes end within a string, or hold more than `most`."""
    strings: list[bytes] = []
    place = 0
    while place < len(raw):
        if len(strings) == most:
            raise _bad(DATA, f"has more than {most} texts: want 1 to {most}")
        start = place + 4
        place = start + int.from_bytes(raw[place:start], "little")
        strings.append(raw[start:place])
    if place > len(raw):
        raise _bad(DATA, "ends within a string: want strings, each after its length in four bytes")
    return strings


def _bad(path: str, what: str, value: int | str | None = None) -> InvalidArgument:
    return InvalidArgument.of([FieldProblem(path, f"{path} {what}", value)])


def _problem(fault: Mapping[str, Any]) -> FieldProblem:
    """A fault that pydantic has found, in the words of all other problems."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])[1:]
    names = [part for part in fault["loc"] if isinstance(part, str)]
    in_value = bool(fault["loc"]) and isinstance(fault["loc"][-1], str)
    in_name = fault["type"] == "string_unicode" and not in_value  # lone surrogates
    if in_name:
        names, path = [*names, fault["input"]], f"{path}.{fault['input']}".removeprefix(".")
    if in_name or fault["type"] == "extra_forbidden":
        known = [key.rpartition(".")[2] for key in WANTED if key.split(".")[:-1] == names[:-1]]
        return FieldProblem.unknown(path, fault["input"], known)
    wanted = WANTED[".".join(names)]
    if fault["type"] == "missing":
        return FieldProblem.missing(path, wanted)
    return FieldProblem.of(path, fault["input"], wanted)
