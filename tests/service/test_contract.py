"""The same requests through REST and gRPC: the same answers field by field, the same errors, the same counts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status

from service.errors import CODES, Code, DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from service.rest.errors import STATUS as HTTP_STATUS
from service.rpc.errors import STATUS as GRPC_STATUS
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from tests.fakes import Service

Fields = dict[str, Any]


class Failure(NamedTuple):
    """An error in neutral words."""

    code: str
    message: str
    fields: tuple[str, ...] = ()


class Caller(Protocol):
    """A transport, as a caller sees it: plain values in, plain values or a `Failure` out."""

    transport: str

    async def one(self, fields: Fields) -> Fields | Failure: ...

    async def batch(self, fields: Fields) -> list[Fields | Failure] | Failure: ...

    async def stream(self, fields: Fields) -> list[Fields | Failure]: ...


class Rest:
    transport = "rest"

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def one(self, fields: Fields) -> Fields | Failure:
        return self._end(await self._client.post("/denoise", json=fields))

    async def batch(self, fields: Fields) -> list[Fields | Failure] | Failure:
        end = self._end(await self._client.post("/denoise/batch", json=fields))
        if isinstance(end, Failure):
            return end
        return [
            present(result["answer"]) if "answer" in result else self._failure(result["problem"])
            for result in end["results"]
        ]

    async def stream(self, fields: Fields) -> list[Fields | Failure]:
        response = await self._client.post("/denoise/stream", json=fields)
        if response.status_code != 200:
            return [self._end(response)]
        events = []
        for frame in response.text.removesuffix("\n\n").split("\n\n"):
            event, document = frame.split("\n")
            value = json.loads(document.removeprefix("data: "))
            events.append(self._failure(value) if event == "event: problem" else present(value))
        return events

    def _end(self, response: httpx.Response) -> Fields | Failure:
        if response.status_code == 200:
            return present(response.json())
        failure = self._failure(response.json())
        assert response.status_code == HTTP_STATUS[failure.code]  # type: ignore[index] # one of ours, or a KeyError
        return failure

    def _failure(self, problem: Fields) -> Failure:
        fields = tuple(error["field"] for error in problem.get("errors", []))
        return Failure(problem["type"].removeprefix("urn:rdt:problem:"), problem["detail"], fields)


class Rpc:
    transport = "grpc"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = DenoiserStub(channel)

    async def one(self, fields: Fields) -> Fields | Failure:
        try:
            return plain(await self._stub.Denoise(ParseDict(fields, pb.DenoiseRequest())))
        except grpc.aio.AioRpcError as error:
            return self._failure(error)

    async def batch(self, fields: Fields) -> list[Fields | Failure] | Failure:
        options = {name: value for name, value in fields.items() if name != "items"}
        message = ParseDict({"items": fields["items"], "options": options}, pb.DenoiseBatchRequest())
        try:
            answer = await self._stub.DenoiseBatch(message)
        except grpc.aio.AioRpcError as error:
            return self._failure(error)
        return [
            plain(result.answer)
            if result.HasField("answer")
            else Failure(result.problem.code, result.problem.message, tuple(e.field for e in result.problem.errors))
            for result in answer.results
        ]

    async def stream(self, fields: Fields) -> list[Fields | Failure]:
        events: list[Fields | Failure] = []
        try:
            async for event in self._stub.DenoiseStream(ParseDict(fields, pb.DenoiseRequest())):
                events.append(plain(getattr(event, event.WhichOneof("event"))))
        except grpc.aio.AioRpcError as error:
            events.append(self._failure(error))
        return events

    def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        status = rpc_status.from_call(error)
        assert status is not None
        fault, violations = ErrorInfo(), BadRequest()
        for detail in status.details:
            detail.Unpack(fault)
            detail.Unpack(violations)
        code = fault.reason.lower()
        assert error.code() == GRPC_STATUS[code]  # type: ignore[index] # one of ours, or a KeyError
        return Failure(code, error.details() or "", tuple(bad.field for bad in violations.field_violations))


def plain(message: Message) -> Fields:
    """As the JSON interface has it: numbers as numbers, and every field that is not empty."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Message):
            return plain(value)
        return [value_of(item) for item in value] if hasattr(value, "append") else value

    return present({field.name: value_of(getattr(message, field.name)) for field in message.DESCRIPTOR.fields})


def present(fields: Fields) -> Fields:
    """Without what is null, or an empty text or list: a message cannot tell these from what is absent."""
    out = {}
    for name, value in fields.items():
        inner = [present(v) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else value
        if inner not in (None, "", []) or name == "text":
            out[name] = present(inner) if isinstance(inner, dict) else inner
    return out


@pytest.fixture
async def callers(service: Service) -> AsyncIterator[tuple[Rest, Rpc]]:
    async with service.client() as client, service.channel() as channel:
        yield Rest(client), Rpc(channel)


async def both(callers: tuple[Caller, ...], ask: Callable[[Caller], Any]) -> Any:
    """The end by either transport, once it is known to be the same."""
    rest, rpc = [await ask(caller) for caller in callers]
    assert rest == rpc
    return rest


GOOD: dict[str, Fields] = {
    "text only": {"text": "The quick [MASK]  FOX!"},
    "all options": {
        "text": "[mask] é😀", "max_steps": 5, "threshold": 0.0, "halting": "settle", "restore": "all", "top_k": 3,
        "trace": True, "timeout_ms": 5000,
    },
    "no mask": {"text": "a"},
    "nothing but masks": {"text": "[MASK][MASK]"},
    "byte order mark": {"text": "\ufeffthe [MASK]"},
    "largest numbers": {"text": "a", "threshold": 1.7976931348623157e308, "timeout_ms": 3_600_000},
    "corruption": {"text": "the quick brown fox", "mask_ratio": 0.5, "seed": 2**62},
    "zeroes": {"text": "the [MASK]", "threshold": 0, "top_k": 0, "trace": False, "mask_ratio": 0, "seed": 0},
}  # fmt: skip

BAD: dict[str, tuple[Fields, Code, set[str]]] = {
    "empty text": ({"text": ""}, "invalid_argument", {"text"}),
    "no token": ({"text": "\u200b"}, "invalid_argument", {"text"}),
    "spaces": ({"text": "  \n"}, "invalid_argument", {"text"}),
    "byte order mark alone": ({"text": "\ufeff"}, "invalid_argument", {"text"}),
    "NUL": ({"text": "a\0"}, "invalid_argument", {"text"}),
    "max_steps": ({"text": "a", "max_steps": 0}, "invalid_argument", {"max_steps"}),
    "threshold": ({"text": "a", "threshold": -1.0}, "invalid_argument", {"threshold"}),
    "words": ({"text": "a", "halting": "x", "restore": ""}, "invalid_argument", {"halting", "restore"}),
    "top_k": ({"text": "a", "top_k": 6}, "invalid_argument", {"top_k"}),
    "timeout_ms": ({"text": "a", "timeout_ms": 0}, "invalid_argument", {"timeout_ms"}),
    "mask_ratio": ({"text": "a", "mask_ratio": 1.5}, "invalid_argument", {"mask_ratio"}),
    "seed": ({"text": "a", "seed": -1}, "invalid_argument", {"seed"}),
    "too many tokens": ({"text": "a " * 40}, "too_large", {"text"}),
    "too many characters": ({"text": "a" * 1025}, "too_large", {"text"}),
}

ENGINE_ERRORS = [
    ResourceExhausted("full", "queue_requests"),
    Unavailable("draining", "draining"),
    DeadlineExceeded("late"),
    Internal("broken"),
    RuntimeError("a secret of the house"),
]


def test_every_code_has_a_status() -> None:
    assert set(GRPC_STATUS) == set(CODES)


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD)
async def test_a_good_request(service: Service, callers: tuple[Rest, Rpc], fields: Fields) -> None:
    answer = await both(callers, lambda caller: caller.one(fields))
    assert answer["steps"] == 2
    rest_job, rpc_job = service.engine.jobs
    assert rest_job == rpc_job

    *passes, last = await both(callers, lambda caller: caller.stream(fields))
    assert last == answer
    assert [event["step"] for event in passes] == [1, 2]
    assert passes[-1]["text"] == answer["text"]

    [item] = await both(callers, lambda caller: caller.batch({"items": [fields]}))
    assert item == answer


@pytest.mark.parametrize(("fields", "code", "named"), BAD.values(), ids=BAD)
async def test_a_bad_request(
    service: Service, callers: tuple[Rest, Rpc], fields: Fields, code: Code, named: set[str]
) -> None:
    failure = await both(callers, lambda caller: caller.one(fields))
    assert (failure.code, set(failure.fields)) == (code, named)
    assert await both(callers, lambda caller: caller.stream(fields)) == [failure]
    ends = await both(callers, lambda caller: caller.batch({"items": [{"text": "a"}, fields]}))
    assert ends[0]["text"] == "a"
    assert ends[1] == Failure(code, f"items[1]: {failure.message}", tuple(f"items[1].{f}" for f in failure.fields))
    for caller in callers:
        labels = {"transport": caller.transport, "outcome": code}
        assert service.sample("rdt_requests_total", **labels) == 3, "an item counts as a request"


@pytest.mark.parametrize("error", ENGINE_ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_engine(
    service: Service, callers: tuple[Rest, Rpc], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has what a caller is not told."""
    service.engine.error = error
    failure = await both(callers, lambda caller: caller.one({"text": "a"}))
    assert failure.code == getattr(error, "code", "internal")
    assert "secret" not in failure.message
    caplog.clear()
    assert await both(callers, lambda caller: caller.batch({"items": [{"text": "a"}] * 2})) == [failure] * 2
    assert caplog.text.count("RuntimeError: a secret") == (4 if isinstance(error, RuntimeError) else 0)
    assert await both(callers, lambda caller: caller.stream({"text": "a"})) == [failure]
    caplog.clear()
    service.engine.error_after_pass = 1
    first, end = await both(callers, lambda caller: caller.stream({"text": "a"}))
    assert (first["step"], end) == (1, failure)
    assert caplog.text.count("RuntimeError: a secret") == (2 if isinstance(error, RuntimeError) else 0)


async def test_shared_options_and_items_that_override_them(service: Service, callers: tuple[Rest, Rpc]) -> None:
    batch = {"items": [{"text": "a"}, {"text": "b", "max_steps": 7, "trace": False}], "max_steps": 3, "trace": True}
    first, second = await both(callers, lambda caller: caller.batch(batch))
    assert (first["max_steps"], second["max_steps"]) == (3, 7)
    assert ("trace" in first, "trace" in second) == (True, False)
    assert [job.max_steps for job in service.engine.jobs] == [3, 7, 3, 7]


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"items": []}, ("items",)),
        ({"items": [{"text": "a"}] * 5}, ("items",)),
        ({"items": [{"text": "a"}], "max_steps": 0}, ("max_steps",)),
        ({"items": [], "top_k": 6, "halting": "x"}, ("items", "top_k", "halting")),
    ],
)
async def test_a_batch_that_is_none(
    service: Service, callers: tuple[Rest, Rpc], batch: Fields, named: tuple[str, ...]
) -> None:
    """What is wrong is named as the transport has it: a message has the shared options in one of its own."""
    for caller, options in zip(callers, ("", "options."), strict=True):
        failure = await caller.batch(batch)
        assert isinstance(failure, Failure)
        paths = tuple(name if name == "items" else options + name for name in named)
        assert (failure.code, failure.fields) == ("invalid_argument", paths)
        assert [problem.split()[0] for problem in failure.message.split("; ")] == list(paths)
    assert service.engine.jobs == []


async def test_the_model(service: Service) -> None:
    async with service.client() as client, service.channel() as channel:
        card = (await client.get("/model")).json()
        model = await DenoiserStub(channel).GetModel(pb.GetModelRequest())
    assert dict(model.limits) == card["limits"]
    assert model.configuration["max_seq_len"] == card["configuration"]["max_seq_len"]
    for name in ("name", "digest", "device", "precision", "n_parameters"):
        assert getattr(model, name) == card[name]


@pytest.mark.parametrize("state", ["loading", "draining"])
async def test_not_ready(service: Service, callers: tuple[Rest, Rpc], state: str) -> None:
    if state == "loading":
        service.lifecycle._denoiser = None
    else:
        await service.lifecycle.drain(0)
    failure = await both(callers, lambda caller: caller.one({"text": "a"}))
    assert failure.code == "unavailable"
    assert await both(callers, lambda caller: caller.batch({"items": [{"text": "a"}]})) == failure
    assert await both(callers, lambda caller: caller.stream({"text": "a"})) == [failure]
    assert service.sample("rdt_refused_total", reason=state) == 6
