"""Whatever a caller sends, the answer is a problem document that names what is wrong; never a 500."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Malformed
from service.rest.body import parse_json
from tests.fakes import MAX_BODY_BYTES, Service

JSON = {"Content-Type": "application/json"}

# name, body, the fields to blame, a word of the message
BAD_FIELDS: list[tuple[str, str, set[str], str]] = [
    ("empty text", '{"text": ""}', {"text"}, "at least one character"),
    ("zero-width text", '{"text": "\\u200b"}', {"text"}, "at least one token"),
    ("control characters", '{"text": "\\u0001\\u0002"}', {"text"}, "at least one token"),
    ("spaces", '{"text": "  \\n"}', {"text"}, "at least one token"),
    ("NUL", '{"text": "a\\u0000b"}', {"text"}, "NUL"),
    ("lone surrogate", '{"text": "a\\ud800"}', {"text"}, "surrogate"),
    ("no text", '{"max_steps": 3}', {"text"}, "missing"),
    ("text is a number", '{"text": 3}', {"text"}, "string"),
    ("text is null", '{"text": null}', {"text"}, "string"),
    ("text is nested", '{"text": [["a"]]}', {"text"}, "an array"),
    ("max_steps 0", '{"text": "a", "max_steps": 0}', {"max_steps"}, "from 1 to 100"),
    ("max_steps -1", '{"text": "a", "max_steps": -1}', {"max_steps"}, "from 1 to 100"),
    ("max_steps 1.5", '{"text": "a", "max_steps": 1.5}', {"max_steps"}, "whole number"),
    ("max_steps 1e9", '{"text": "a", "max_steps": 1e9}', {"max_steps"}, "from 1 to 100"),
    ("max_steps 101", '{"text": "a", "max_steps": 101}', {"max_steps"}, "max_steps is 101"),
    ("max_steps true", '{"text": "a", "max_steps": true}', {"max_steps"}, "max_steps is true"),
    ("max_steps string", '{"text": "a", "max_steps": "3"}', {"max_steps"}, 'max_steps is "3"'),
    ("max_steps enormous", '{"text": "a", "max_steps": ' + "9" * 3000 + "}", {"max_steps"}, "whole number"),
    ("threshold NaN", '{"text": "a", "threshold": NaN}', {"threshold"}, "threshold is NaN"),
    ("threshold Infinity", '{"text": "a", "threshold": Infinity}', {"threshold"}, "finite"),
    ("threshold 1e999", '{"text": "a", "threshold": 1e999}', {"threshold"}, "finite"),
    ("threshold negative", '{"text": "a", "threshold": -0.1}', {"threshold"}, ">= 0"),
    ("threshold string", '{"text": "a", "threshold": "x"}', {"threshold"}, "finite number"),
    ("threshold enormous", '{"text": "a", "threshold": ' + "9" * 3000 + "}", {"threshold"}, "finite number"),
    ("halting", '{"text": "a", "halting": "never"}', {"halting"}, "gate or settle"),
    ("restore", '{"text": "a", "restore": "some"}', {"restore"}, "masked or all"),
    ("top_k negative", '{"text": "a", "top_k": -1}', {"top_k"}, "from 0 to 5"),
    ("top_k above", '{"text": "a", "top_k": 6}', {"top_k"}, "from 0 to 5"),
    ("trace", '{"text": "a", "trace": 1}', {"trace"}, "true or false"),
    ("timeout_ms 0", '{"text": "a", "timeout_ms": 0}', {"timeout_ms"}, "from 1 to"),
    ("timeout_ms above", '{"text": "a", "timeout_ms": 3600001}', {"timeout_ms"}, "3600000"),
    ("mask_ratio", '{"text": "a", "mask_ratio": 1.1}', {"mask_ratio"}, "from 0 to 1"),
    ("seed", '{"text": "a", "seed": 9223372036854775808}', {"seed"}, "from 0 to"),
    ("unknown field", '{"text": "a", "colour": 1}', {"colour"}, "colour is not a field"),
    ("odd field name", '{"text": "a", "\\ud800": 1}', {"\\ud800"}, "not a field"),
    ("many at once", '{"max_steps": 1000, "threshold": NaN, "x": 1}', {"text", "max_steps", "threshold", "x"}, "x is"),
]  # fmt: skip

# name, body, headers, status
BAD_BODIES: list[tuple[str, bytes, dict[str, str], int]] = [
    ("not JSON", b'{"text": ', JSON, 400),
    ("no body", b"", JSON, 400),
    ("not UTF-8", b'{"text": "\xff"}', JSON, 400),
    ("UTF-16", '{"text": "a"}'.encode("utf-16"), JSON, 400),
    ("absurdly nested", b"[" * 4000, JSON, 400),
    ("an array", b"[1]", JSON, 422),
    ("null", b"null", JSON, 422),
    ("a string", b'"text"', JSON, 422),
    ("a form", b"text=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("no content type", b'{"text": "a"}', {}, 415),
    (
        "compressed",
        gzip.compress(b'{"text": "a"}'),
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        415,
    ),
    ("not compressed", b"{", {"Content-Type": "application/json", "Content-Encoding": "Identity"}, 400),
    ("too many bytes", b'{"text": "' + b"a" * MAX_BODY_BYTES + b'"}', JSON, 413),
]


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a response, checked for what RFC 9457 and we promise."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert problem["status"] == status
    assert problem["type"]
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


@pytest.mark.parametrize(
    ("body", "fields", "message"), [case[1:] for case in BAD_FIELDS], ids=[case[0] for case in BAD_FIELDS]
)
async def test_a_bad_field_is_named(service: Service, body: str, fields: set[str], message: str) -> None:
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise", content=body, headers=JSON), 422)
    assert {error["field"] for error in problem["errors"]} == fields
    assert message in problem["detail"]
    assert all(error["message"] in problem["detail"] for error in problem["errors"])
    assert service.engine.jobs == []


@pytest.mark.parametrize(
    ("body", "headers", "status"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES]
)
async def test_a_bad_body_is_refused(service: Service, body: bytes, headers: dict[str, str], status: int) -> None:
    async with service.client() as client:
        problem_of(await client.post("/denoise", content=body, headers=headers), status)
    assert service.engine.jobs == []


def test_what_is_no_utf8_is_named() -> None:
    with pytest.raises(Malformed, match="the body is not UTF-8: byte 10 is 0xff"):
        parse_json(b'{"text": "\xff"}')


def test_a_number_of_too_many_digits() -> None:
    with pytest.raises(Malformed, match="4300 digits"):
        parse_json(b'{"text": "a", "seed": ' + b"9" * 5000 + b"}")


async def test_the_value_sent_comes_back_with_the_error(service: Service) -> None:
    body = json.dumps({"text": "a", "max_steps": 0, "halting": "x" * 1000, "threshold": [1]})
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise", content=body, headers=JSON), 422)
    values = {error["field"]: error["value"] for error in problem["errors"]}
    assert values == {"max_steps": 0, "halting": "x" * 80 + "…", "threshold": "an array"}


async def test_very_many_bad_fields_get_a_short_answer(service: Service) -> None:
    fields = {f"k{i}": 1 for i in range(300)}
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise", json={"text": "a", **fields}), 422)
    assert len(problem["errors"]) == 20
    assert problem["detail"].endswith("and 280 more")


async def test_a_text_over_max_seq_len_names_both_lengths(service: Service) -> None:
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise", json={"text": "a " * 40}), 413)
    assert problem["errors"][0]["field"] == "text"
    assert "42 tokens" in problem["detail"]
    assert "at most 32 tokens" in problem["detail"]


async def test_the_longest_text_is_taken(service: Service) -> None:
    async with service.client() as client:
        assert (await client.post("/denoise", json={"text": "a " * 30})).status_code == 200
        assert (await client.post("/denoise", json={"text": "a " * 31})).status_code == 413


async def test_a_hopelessly_long_text_is_refused_without_tokenising(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.denoiser.encode", lambda *_: pytest.fail("tokenised"))
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise", json={"text": "a" * 1025}), 413)
    assert "1025 characters" in problem["detail"]


async def test_a_body_over_the_limit_without_a_declared_length(service: Service) -> None:
    n_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal n_sent
        for _ in range(1000):
            n_sent += 1024
            yield b"a" * 1024

    async with service.client() as client:
        response = await client.post("/denoise", content=chunks(), headers=JSON)
    assert "content-length" not in response.request.headers
    problem_of(response, 413)
    assert n_sent <= MAX_BODY_BYTES + 2048, "the body was read on after the limit"


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 413)])
async def test_a_body_may_be_as_large_as_the_limit(service: Service, declared: bool, over: int, status: int) -> None:
    body = b'{"text": "a"}'.ljust(MAX_BODY_BYTES + over)

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    async with service.client() as client:
        response = await client.post("/denoise", content=body if declared else chunks(), headers=JSON)
    assert response.status_code == status


async def test_a_declared_length_over_the_limit_is_refused_unread(service: Service) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {**JSON, "Content-Length": "9" * 30}
    async with service.client() as client:
        problem_of(await client.post("/denoise", content=chunks(), headers=headers), 413)


async def test_paths_and_methods_that_do_not_exist(service: Service) -> None:
    async with service.client() as client:
        problem_of(await client.get("/nowhere"), 404)
        problem_of(await client.post("/denoise/", json={"text": "a"}), 404)
        response = await client.get("/denoise")
        assert (await client.head("/denoise")).status_code == 405
    problem = problem_of(response, 405)
    assert (problem["type"], problem["title"]) == ("about:blank", "Method Not Allowed")
    assert problem["detail"] == "GET /denoise: method not allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/model", "/openapi.json"])
async def test_the_methods_that_are_allowed(service: Service, path: str) -> None:
    async with service.client() as client:
        response = await client.post(path)
        assert (await client.head(path)).status_code == 200
    assert sorted(response.headers["allow"].split(", ")) == ["GET", "HEAD"]


async def test_content_type_with_parameters_is_json(service: Service) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    async with service.client() as client:
        assert (await client.post("/denoise", content=b'{"text": "a"}', headers=headers)).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("text", "max_steps", "threshold", "halting", "restore", "top_k", "trace", "timeout_ms", "mask_ratio", "seed")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), json_values, max_size=4))
async def test_nothing_a_caller_can_write_in_json_is_our_fault(service: Service, fields: dict[str, Any]) -> None:
    async with service.client() as client:
        response = await client.post("/denoise", content=json.dumps({"text": "a", **fields}), headers=JSON)
    assert response.status_code in {200, 413, 422}
    if response.status_code != 200:
        problem_of(response, response.status_code)
