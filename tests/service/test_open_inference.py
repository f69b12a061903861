"""The Open Inference Protocol: the same requests over HTTP and gRPC, in every form that its clients send."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core import ModelConfig, Tokenizer
from service.errors import InvalidArgument, NotFound, ResourceExhausted
from service.open_inference import OUTPUTS, RequestedOutput, Tensor, packed, read_inference, unpacked
from service.rest.app import create_app
from service.rest.open_inference import JSON_SIZE
from service.rpc.convert import INFERENCE_SERVICE
from service.rpc.open_inference import InferenceCalls
from service.rpc.pb import open_inference_pb2 as pb
from tests.fakes import MAX_BODY_BYTES, Service

TEXTS = ["the quick brown [MASK]", "a [MASK]"]
RESTORED = ["the quick brown fox", "a fox"]
INFER = "/v2/models/tiny/infer"
VERSION = "0123456789ab"
Fields = dict[str, Any]


def of(data: object = TEXTS, shape: object = (2,), **others: object) -> Fields:
    """A request for two texts."""
    return {"inputs": [{"name": "text", "shape": list(shape), "datatype": "BYTES", "data": data}], **others}  # type: ignore[call-overload]


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client


async def call(channel: grpc.aio.Channel, method: str, request: Any, response: Any) -> Any:
    path = f"/{INFERENCE_SERVICE}/{method}"
    return response.FromString(await channel.unary_unary(path)(request.SerializeToString()))


def infer_request(texts: list[str] = TEXTS, *, raw: bool = False, **parameters: pb.InferParameter) -> Any:
    request = pb.ModelInferRequest(model_name="tiny", id="7", parameters=parameters)
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    if raw:
        request.raw_input_contents.append(packed(texts))
    else:
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    return request


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (TEXTS, [2]),
        ([[text] for text in TEXTS], [2, 1]),
        ([TEXTS], [1, 2]),
        (TEXTS, [1, 2, 1]),
        ([text.encode() for text in TEXTS], [2]),
        (packed(TEXTS), [2, 1]),
    ],
)
def test_texts_in_every_form(service: Service, data: object, shape: list[int]) -> None:
    inference = read_inference(of(data, shape, parameters={"top_k": 3, "threshold": 0}), service.denoiser)
    assert [(item.text, item.top_k, item.threshold) for item in inference.items] == [(text, 3, 0) for text in TEXTS]  # type: ignore[union-attr]
    assert inference.shape == shape
    assert inference.outputs == list(OUTPUTS)
    assert not inference.binary


def test_null_is_as_good_as_nothing(service: Service) -> None:
    tensor = {**of()["inputs"][0], "parameters": None}
    fields = {"inputs": [tensor], **dict.fromkeys(("id", "model_name", "model_version", "parameters", "outputs"))}
    assert read_inference(fields, service.denoiser) == read_inference(of(), service.denoiser)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "the request is an array: want an object with the field inputs"),
        ({}, "inputs is missing: want an array of one tensor, text"),
        ({"inputs": []}, "inputs is an array: want an array of one tensor, text"),
        ({"inputs": of()["inputs"] * 2}, "inputs is an array: want an array of one tensor, text"),
        ({"inputs": [3]}, "inputs[0] is 3: want an array of one tensor, text"),
        ({"inputs": [{}]}, "inputs[0].name is missing: want text"),
        ({"inputs": [{**of()["inputs"][0], "name": "texts"}]}, 'inputs[0].name is "texts": want text'),
        ({"inputs": [{**of()["inputs"][0], "datatype": "FP32"}]}, 'inputs[0].datatype is "FP32": want BYTES'),
        ({"inputs": [{**of()["inputs"][0], "x": 1}]}, "inputs[0].x is not a field: want one of name, shape,"),
        (of(shape=[2.5]), "inputs[0].shape[0] is 2.5: want an array of at most 8 whole numbers"),
        (of(shape=[2] + [1] * 8), "inputs[0].shape is an array: want an array of at most 8 whole numbers"),
        (of(shape=[2**31]), "inputs[0].shape[0] is 2147483648: want"),
        (of(outputs=[{"name": "text"}] * 6), "outputs is an array: want an array of at most 5 objects"),
        (of(shape=[-1, -2]), "inputs[0].shape[0] is -1: want"),
        (of(shape=[3]), "inputs[0].shape is [3], and data has 2 texts: want as many"),
        (of(shape=[]), "inputs[0].shape is [], and data has 2 texts"),
        (of([]), "inputs[0].data has 0 texts: want 1 to 4"),
        (of(["a"] * 5, [5]), "inputs[0].data has 5 texts: want 1 to 4"),
        (of(packed(["a"] * 5), [5]), "inputs[0].data has more than 4 texts: want 1 to 4"),
        (of("a", [1]), 'inputs[0].data is "a": want an array of strings'),
        (of(["a", 3]), "inputs[0].data[1] is 3: want a string"),
        (of([[[[[[[[[["a"]]]]]]]]]], [1]), "inputs[0].data[0] is an array: want a string"),
        (of(["a", b"b\xff"]), "inputs[0].data[1] is not UTF-8: byte 1 is 0xff"),
        (of(["a", ""]), 'inputs[0].data[1]: text is "": want a string of at least one character'),
        (of(packed(TEXTS)[:-1]), "inputs[0].data ends within a string: want strings, each after its length"),
        (of(parameters={"max_steps": 0}), "parameters.max_steps is 0: want a whole number from 1 to 100"),
        (of(parameters={"steps": 1}), "parameters.steps is not a field: want one of max_steps, threshold,"),
        (of(parameters={"text": "a"}), "parameters.text is not a field: want one of max_steps"),
        (of(parameters=[1]), "parameters is an array: want an object"),
        (of(outputs=[{"name": "logits"}]), 'outputs[0].name is "logits": want one of text, steps, halt_reason, level'),
        (of(id=7), "id is 7: want a string"),
        (of(id="\ud800"), 'id is "\\\\ud800": want a string without lone surrogates'),
        ({"\ud800": 1}, "\\ud800 is not a field: want one of id, model_name"),
        (of(outputs=[{"name": "\ud800"}]), 'outputs[0].name is "\\\\ud800": want one of text, steps'),
        ({"inputs": [{"\ud800": 1}]}, "inputs[0].\\ud800 is not a field: want one of name, shape"),
        (of(foo=1), "foo is not a field: want one of id, model_name, model_version, parameters, inputs, outputs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(service: Service, fields: object, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_inference(fields, service.denoiser)
    assert error.value.message.startswith(message)


def test_thousands_of_mistakes_are_counted_and_not_written_out(service: Service) -> None:
    many = {f"x{index}": index for index in range(1000)}
    for wrong in (of(**many), of(parameters=many)):
        with pytest.raises(InvalidArgument, match=r"x19 is not a field: .*; and 980 more$") as error:
            read_inference(wrong, service.denoiser)
        assert len(error.value.problems) == 20


def test_the_body_may_name_the_model_too(service: Service) -> None:
    """KServe's client does."""
    read_inference(of(model_name="tiny", model_version=VERSION), service.denoiser)
    for other, asked in (({"model_version": "9"}, '"tiny", version "9"'), ({"model_name": "big"}, '"big"')):
        with pytest.raises(NotFound, match=f"there is no model {asked}: want tiny, version {VERSION}"):
            read_inference(of(**other), service.denoiser)


@given(st.lists(st.text()))
def test_packing_strings_is_undone(strings: list[str]) -> None:
    assert [one.decode() for one in unpacked(packed(strings), len(strings))] == strings


def test_outputs_in_binary_form() -> None:
    assert Tensor("steps", "INT32", [2], [1, 258]).raw == b"\1\0\0\0\2\1\0\0"
    assert Tensor("level", "FP32", [1], [0.5]).raw == struct.pack("<f", 0.5)
    assert Tensor("text", "BYTES", [2], ["é", ""]).raw == b"\2\0\0\0\xc3\xa9\0\0\0\0"


def test_the_schema_names_the_outputs() -> None:
    assert RequestedOutput.model_json_schema()["properties"]["name"]["enum"] == list(OUTPUTS)


async def test_what_is_said_of_server_and_model(client: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    answer = await client.get("/v2")
    server = answer.json()
    assert answer.headers["content-type"] == "application/json"
    told = await call(channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    assert server == {"name": told.name, "version": told.version, "extensions": list(told.extensions)}

    model = (await client.get("/v2/models/tiny")).json()
    assert model == (await client.get(f"/v2/models/tiny/versions/{VERSION}")).json()
    assert model["versions"] == [VERSION]
    for version in ("", VERSION):
        request = pb.ModelMetadataRequest(name="tiny", version=version)
        described = await call(channel, "ModelMetadata", request, pb.ModelMetadataResponse)
        assert (described.name, list(described.versions), described.platform) == ("tiny", [VERSION], model["platform"])
        for tensors, theirs in ((described.inputs, model["inputs"]), (described.outputs, model["outputs"])):
            assert [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in tensors] == theirs


@pytest.mark.parametrize("raw", [False, True])
async def test_the_same_answer_everywhere(client: httpx.AsyncClient, channel: grpc.aio.Channel, raw: bool) -> None:
    plain = await client.post(INFER, json=of())
    assert plain.headers["content-type"] == "application/json"
    assert set(plain.json()) == {"model_name", "model_version", "outputs"}
    answer = (await client.post(INFER, json=of(id="7", parameters={"max_steps": 9}))).json()
    tensors = {output["name"]: output for output in answer["outputs"]}
    assert {name: output["datatype"] for name, output in tensors.items()} == {
        n: kind for n, (kind, _) in OUTPUTS.items()
    }
    assert [answer["id"], answer["model_name"], answer["model_version"]] == ["7", "tiny", VERSION]
    assert tensors["text"]["data"] == RESTORED
    assert tensors["level"]["data"] == [pytest.approx(1 / 3)] * 2
    batch = (await client.post("/denoise/batch", json={"items": [{"text": t} for t in TEXTS], "max_steps": 9})).json()
    assert list(map(json.loads, tensors["answer"]["data"])) == [result["answer"] for result in batch["results"]]

    request = infer_request(raw=raw, max_steps=pb.InferParameter(int64_param=9))
    told = await call(channel, "ModelInfer", request, pb.ModelInferResponse)
    assert [told.id, told.model_name, told.model_version] == ["7", "tiny", VERSION]
    for place, output in enumerate(told.outputs):
        assert (output.datatype, list(output.shape)) == (tensors[output.name]["datatype"], [2])
        wanted = tensors[output.name]["data"]
        if raw:
            assert told.raw_output_contents[place] == Tensor(output.name, output.datatype, [2], wanted).raw
        else:
            ((_, values),) = output.contents.ListFields()
            assert [v.decode() if isinstance(v, bytes) else pytest.approx(v) for v in values] == wanted
    assert [output.name for output in told.outputs] == list(OUTPUTS)


async def test_binary_tensors_follow_the_json(client: httpx.AsyncClient) -> None:
    raw = packed(TEXTS)
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    outputs = [{"name": "steps"}, {"name": "level", "parameters": {"binary_data": False}}, {"name": "text"}]
    fields = {"inputs": [tensor], "outputs": outputs, "parameters": {"binary_data_output": True}}
    head = json.dumps(fields).encode()

    async def posted(body: bytes, size: object) -> httpx.Response:
        return await client.post(INFER, content=body, headers={JSON_SIZE: str(size).encode("latin-1")})

    def counted(n_bytes: object) -> bytes:
        return json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": n_bytes}}]}).encode()

    answer = await posted(head + raw, len(head))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    size = int(answer.headers[JSON_SIZE])
    steps, level, text = json.loads(answer.content[:size])["outputs"]
    assert level["data"] == [pytest.approx(1 / 3)] * 2
    for binary, n_bytes in ((steps, 8), (text, len(packed(RESTORED)))):
        assert binary["parameters"] == {"binary_data_size": n_bytes}
        assert set(binary) == {"name", "datatype", "shape", "parameters"}
    assert answer.content[size:] == struct.pack("<ii", 2, 2) + packed(RESTORED)

    for body, given_size, message in (
        (head + raw + b"?", len(head), "1 bytes of the body belong to no tensor"),
        (head + raw[:-1], len(head), "bytes of the body belong to no tensor"),
        (head, len(head) + 1, f"want a whole number up to {len(head)}, the size of the body"),
        (head, "-1", f'{JSON_SIZE} is "-1": want'),
        (head, "9" * 5000, f"want a whole number up to {len(head)}"),
        (head, "\xb2", "want a whole number up to"),  # a digit, and no number
        (counted(-1) + raw, len(counted(-1)), f"{len(raw)} bytes of the body belong to no tensor"),
        (counted(True) + b"?", len(counted(True)), "1 bytes of the body belong to no tensor"),
        (counted("1") + b"?", len(counted("1")), "1 bytes of the body belong to no tensor"),
        (counted(0), len(counted(0)), "inputs[0].data has 0 texts"),
        (head, len(head), "inputs[0].data is missing: want an array of strings"),
    ):
        refused = await posted(body, given_size)
        assert refused.status_code in (400, 422)
        assert message in refused.json()["error"]


async def test_errors_are_where_clients_of_the_protocol_look(client: httpx.AsyncClient, service: Service) -> None:
    for path in ("/v2/models/other", "/v2/models/tiny/versions/9", "/v2/models/other/ready"):
        unknown = await client.get(path)
        assert unknown.status_code == 404
        assert unknown.json()["error"] == unknown.json()["detail"]
        assert unknown.json()["type"] == "urn:rdt:problem:not_found"
        assert unknown.json()["request_id"] == unknown.headers["x-request-id"]
    assert (await client.post("/v2/models/other/infer", content=b"not even read")).status_code == 404
    for no_request in ([], {"inputs": 3}, {"inputs": [3]}, {"inputs": [{"parameters": 3}]}):
        assert (await client.post(INFER, json=no_request)).status_code == 422
    bad = await client.post(INFER, json=of(parameters={"max_steps": 0}))
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "parameters.max_steps")
    long = await client.post(INFER, json=of(["a", "a " * 100]))
    assert (long.status_code, long.json()["errors"][0]["field"]) == (413, "inputs[0].data[1].text")
    service.engine.error = ResourceExhausted("the queue is full", "queue_requests")
    full = await client.post(INFER, json=of())
    assert (full.status_code, full.json()["error"], full.headers["retry-after"]) == (429, "the queue is full", "1")
    assert service.sample("rdt_requests_total", transport="rest", outcome="not_found") == 1
    assert service.sample("rdt_requests_total", transport="rest", outcome="invalid_argument") == 5
    assert service.sample("rdt_requests_total", transport="rest", outcome="resource_exhausted") == 2


async def test_so_are_those_that_no_route_of_it_answers(service: Service) -> None:
    service.engine.error = RuntimeError("a defect")
    app = create_app(service.lifecycle, service.metrics, max_body_bytes=4096, api_key="s3cret")
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://rdt") as client:
        key = {"X-API-Key": "s3cret"}
        for answer, status in (
            (await client.get("/v2"), 401),
            (await client.get("/v2/nowhere", headers=key), 404),
            (await client.get(INFER, headers=key), 405),
            (await client.post(INFER, json=of(), headers=key), 500),
        ):
            assert (answer.status_code, answer.json()["error"]) == (status, answer.json()["detail"])
        elsewhere = await client.get("/v22", headers=key)
        assert (elsewhere.status_code, "error" in elsewhere.json()) == (404, False)


@pytest.mark.parametrize(("media_type", "status"), [("", 200), ("application/octet-stream", 200), ("text/plain", 415)])
async def test_content_types(client: httpx.AsyncClient, media_type: str, status: int) -> None:
    headers = {"content-type": media_type} if media_type else {}
    answer = await client.post(INFER, content=json.dumps(of()).encode(), headers=headers)
    assert answer.status_code == status
    assert ("want application/json" in answer.text) == (status == 415)


async def test_errors_over_grpc(channel: grpc.aio.Channel, service: Service) -> None:
    mixed = infer_request(raw=True)
    mixed.inputs[0].contents.bytes_contents.append(b"a")
    fewer = infer_request(raw=True)
    fewer.raw_input_contents.append(b"")
    unset = infer_request(max_steps=pb.InferParameter())
    other = infer_request()
    other.model_name = "other"
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for request, code, message in (
        (mixed, invalid, "raw_input_contents has 1 parts: want one for each of 1 inputs, or none"),
        (fewer, invalid, "raw_input_contents has 2 parts"),
        (infer_request(max_steps=pb.InferParameter(string_param="2")), invalid, 'parameters.max_steps is "2": want'),
        (infer_request(["a", "\0"]), invalid, "inputs[0].data[1]: text is "),
        (infer_request(["a"] * 5), invalid, "inputs[0].data has 5 texts: want 1 to 4"),
        (infer_request(["a" * MAX_BODY_BYTES]), invalid, f"larger than {MAX_BODY_BYTES} bytes"),
        (other, grpc.StatusCode.NOT_FOUND, 'no model "other": want tiny'),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "ModelInfer", request, pb.ModelInferResponse)
        assert error.value.code() == code
        assert message in str(error.value.details())
    assert (await call(channel, "ModelInfer", unset, pb.ModelInferResponse)).outputs, "a parameter without a value"
    assert service.sample("rdt_requests_total", transport="grpc", outcome="not_found") == 1
    with pytest.raises(grpc.aio.AioRpcError, match=r"the message is not a inference\.ModelInferRequest"):
        await channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")(b"\xff\xff")


async def test_very_many_mistakes_over_grpc(channel: grpc.aio.Channel) -> None:
    """Statuses travel as headers, of which proxies take 4 KiB and clients 8. Both report more as the server's fault."""
    for name, n_names, n_told in (("x", 30, 5), ("x" * 79, 30, 3), ("𝄞" * 79, 9, 1)):
        names = [f"{index}{name}" for index in range(n_names)]
        request = infer_request(**dict.fromkeys(names, pb.InferParameter(int64_param=1)))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "ModelInfer", request, pb.ModelInferResponse)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert str(error.value.details()).count("is not a field: want one of max_steps") >= n_told


async def test_fractions_may_be_strings_over_grpc(channel: grpc.aio.Channel, service: Service) -> None:
    def value(text: str) -> pb.InferParameter:
        return pb.InferParameter(string_param=text)

    for quarter in (value("0.25"), pb.InferParameter(double_param=0.25)):
        await call(channel, "ModelInfer", infer_request(threshold=quarter), pb.ModelInferResponse)
        assert service.engine.jobs.pop().threshold == 0.25
    for text, message in (("a lot", 'parameters.threshold is "a lot"'), ("nan", "parameters.threshold is NaN")):
        request = infer_request(threshold=value(text))
        with pytest.raises(grpc.aio.AioRpcError, match=f"{message}: want a finite number"):
            await call(channel, "ModelInfer", request, pb.ModelInferResponse)


async def test_readiness(client: httpx.AsyncClient, channel: grpc.aio.Channel, service: Service) -> None:
    async def over_grpc() -> list[bool]:
        model = pb.ModelReadyRequest(name="tiny")
        return [
            (await call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live,
            (await call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready,
            (await call(channel, "ModelReady", model, pb.ModelReadyResponse)).ready,
        ]

    async def over_http() -> list[tuple[int, Fields]]:
        paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready")
        return [(answer.status_code, answer.json()) for answer in [await client.get(path) for path in paths]]

    assert await over_grpc() == [True, True, True]
    assert await over_http() == [(200, {"live": True}), (200, {"ready": True}), (200, {"name": "tiny", "ready": True})]
    service.engine.ready = False
    assert await over_grpc() == [True, False, False]
    live, ready, (status, problem) = await over_http()
    assert (live, ready) == ((200, {"live": True}), (503, {"ready": False}))
    assert (status, problem["error"]) == (503, "the engine has failed")
    assert (await client.post(INFER, content=b"?")).status_code == 503, "before anything is read"
    with pytest.raises(grpc.aio.AioRpcError, match="the engine has failed"):
        await channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")(b"\xff\xff")


async def test_probes_need_no_key(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> None:
    service = Service(tiny_tokenizer, tiny_config, api_key="s3cret").open()
    paths = ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/tiny", "/v2/models/tiny/ready")
    async with service.client() as client:
        assert [(await client.get(path)).status_code for path in paths] == [200, 200, 401, 401, 401]
        assert (await client.post(INFER, json=of())).status_code == 401
        assert (await client.post(INFER, json=of(), headers={"x-api-key": "s3cret"})).status_code == 200
    async with service.channel() as channel:
        assert (await call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live
        assert (await call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready
        with pytest.raises(grpc.aio.AioRpcError, match="send the key"):
            await call(channel, "ModelReady", pb.ModelReadyRequest(name="tiny"), pb.ModelReadyResponse)


def test_every_method_is_served(service: Service) -> None:
    handler = InferenceCalls(service.lifecycle, service.metrics, MAX_BODY_BYTES).handler()
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        details: Any = type("Details", (), {"method": f"/{INFERENCE_SERVICE}/{method.name}"})
        assert handler.service(details) is not None
