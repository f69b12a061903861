"""The OpenAPI document."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from service.rest.app import create_app
from service.rest.open_inference import MODEL_PATHS
from service.schema import OPTIONS, DenoiseAnswer, DenoiseRequest
from service.version import release
from tests.fakes import Service


async def test_the_openapi_document(service: Service) -> None:
    async with service.client() as client:
        schema = (await client.get("/openapi.json")).json()
        assert [(await client.get(path)).status_code for path in ("/docs", "/redoc", "/model/")] == [404] * 3
        assert {"Problem", "DenoisePass", "InferRequest"} <= set(schema["components"]["schemas"])
    assert not any("security" in operation for path in schema["paths"].values() for operation in path.values())
    assert {"401", "503"} <= set(schema["paths"]["/metrics"]["get"]["responses"])
    operation = schema["paths"]["/denoise"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    assert request["required"] == ["text"]
    assert request["additionalProperties"] is False
    assert "GET /model" in request["description"], "bounds that are this server's stand nowhere else"
    assert "without a point" in request["description"], "to JSON Schema 2.0 is an integer, too"
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert answer == "#/components/schemas/DenoiseAnswer"
    assert set(operation["responses"]) == {"200", "400", "401", "413", "415", "422", "429", "500", "503", "504"}
    whole_batch = schema["paths"]["/denoise/batch"]["post"]["responses"]
    assert set(operation["responses"]) - set(whole_batch) == {"504"}, "only items end with it"
    for status, response in operation["responses"].items():
        if status != "200":
            assert set(response["content"]) == {"application/problem+json"}
    references = set(re.findall(r'"\$ref": ?"(.*?)"', httpx.Response(200, json=schema).text))
    found = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert references <= found, "a reference leads nowhere"
    for path, operations in schema["paths"].items():
        for told in operations.values():
            parameters = [field["name"] for field in told.get("parameters", ()) if field["required"]]
            assert parameters == re.findall(r"{(\w+)}", path)
    assert set(schema["components"]["schemas"]["DenoiseAnswer"]["properties"]) == set(DenoiseAnswer.model_fields)


async def test_bounds_in_the_openapi_document_are_whole_numbers(service: Service) -> None:
    async with service.client() as client:
        document = (await client.get("/openapi.json")).text
    assert '"maximum":9223372036854775807' in document
    assert re.findall(r'"(?:min|max)\w*": ?\d+[.e]\S*', document) == []


KEYED = {"/denoise", "/denoise/batch", "/denoise/stream", "/metrics", "/model", "/v2", *MODEL_PATHS} | {
    f"{path}/{what}" for path in MODEL_PATHS for what in ("ready", "infer")
}


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"api_key": "s3cret"}, KEYED),
        ({"admin_key": "0ther"}, {"/model/reload"}),
        ({"api_key": "s3cret", "admin_key": "0ther"}, KEYED | {"/model/reload"}),
    ],
)
def test_the_openapi_document_says_where_a_key_is_wanted(service: Service, keys: Any, wanted: set[str]) -> None:
    async def reload() -> Any: ...

    app = create_app(service.lifecycle, service.metrics, max_body_bytes=4096, reload=reload, **keys)
    schema = app.openapi()
    keyed = {path for path, methods in schema["paths"].items() if all("security" in one for one in methods.values())}
    assert keyed == wanted
    assert schema["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }


ANSWERS = {
    "/denoise": "DenoiseAnswer", "/denoise/batch": "BatchAnswer", "/denoise/stream": "text/event-stream",
    "/health/live": "Liveness", "/health/ready": "Readiness", "/metrics": "text/plain", "/model": "ModelCard",
    "/model/reload": "ReloadAnswer", "/v2": "ServerMetadata", "/v2/health/live": "Live", "/v2/health/ready": "Ready",
    **dict.fromkeys(MODEL_PATHS, "ModelMetadata"),
    **{f"{path}/ready": "ModelReady" for path in MODEL_PATHS},
    **{f"{path}/infer": "InferResponse" for path in MODEL_PATHS},
}  # fmt: skip


PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


def test_the_openapi_document_has_every_answer(service: Service) -> None:
    async def reload() -> Any: ...

    app = create_app(service.lifecycle, service.metrics, max_body_bytes=9, reload=reload, api_key="a", admin_key="b")
    schema = app.openapi()
    assert schema["info"] == {"title": "RDT", "version": release()}
    found = {}
    for path, operations in schema["paths"].items():
        (told,) = operations.values()
        answer = told["responses"].pop("200")["content"]
        if path.endswith("/infer"):  # either may have binary tensors, which follow its JSON
            assert "Inference-Header-Content-Length" in told["description"]
            for contents in (answer, told["requestBody"]["content"]):
                assert contents.pop("application/octet-stream") == {"schema": {"type": "string", "format": "binary"}}
        ((media_type, content),) = answer.items()
        found[path] = content["schema"].get("$ref", media_type).removeprefix("#/components/schemas/")
        assert ("401" in told["responses"]) == ("security" in told)
        assert ("404" in told["responses"]) == ("{name}" in path)
        assert told.get("security") in (None, [{"bearer": []}, {"key": []}])
        bad = answer if path.endswith("health/ready") else PROBLEM
        assert all(response["content"] == bad for response in told["responses"].values())
        assert "503" in told["responses"] or path in ("/health/live", "/v2", "/v2/health/live")
    assert found == ANSWERS
    paths = schema["paths"]
    assert paths["/denoise/stream"]["post"]["responses"].keys() == paths["/denoise"]["post"]["responses"].keys()
    batch = paths["/denoise/batch"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (batch["title"], batch["required"], batch["additionalProperties"]) == ("BatchRequest", ["items"], False)
    assert set(batch["properties"]) == {"items", *OPTIONS}
    items = batch["properties"]["items"]
    assert (batch["type"], items["type"], items["minItems"]) == ("object", "array", 1)
    assert items["items"]["required"] == ["text"]


def test_the_openapi_document_says_what_is_refused_and_when_to_try_again(service: Service) -> None:
    paths = service.app.openapi()["paths"]
    for operations in paths.values():
        for told in operations.values():
            for status, response in told["responses"].items():
                refused = status == "429" or (status == "503" and response["content"] == PROBLEM)
                assert list(response.get("headers", ())) == (["Retry-After"] if refused else [])
    refused = paths["/denoise"]["post"]["responses"]["429"]
    assert refused["headers"]["Retry-After"]["schema"] == {"type": "integer"}
    for reason in ("queue is full", "short of memory", "too much is being sent"):
        assert reason in refused["description"]


async def test_the_examples_in_the_openapi_document_are_answered(service: Service) -> None:
    answered = []
    async with service.client() as client:
        for path, operations in service.app.openapi()["paths"].items():
            if body := operations.get("post", {}).get("requestBody"):
                assert body["required"] is True
                example = body["content"]["application/json"]["example"]
                response = await client.post(path.format(name="tiny", version="0123456789ab"), json=example)
                answered.append(response.status_code)
                assert '"problem":{' not in response.text, "of a batch, each item"
    assert answered == [200] * 5


def test_null_is_allowed_where_it_is_taken() -> None:
    schema = DenoiseRequest.model_json_schema()["properties"]
    assert {name for name, field in schema.items() if {"type": "null"} not in field.get("anyOf", [])} == {"text"}
    assert schema["top_k"]["anyOf"][0] == {"type": "integer", "minimum": 0}
