"""Which model answers, and what is said of it while there is none, one, or another."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rdt_core import ModelConfig, Tokenizer
from tests.fakes import Service
from tests.service.test_open_inference import INFER, of

ONE = {"text": "a [MASK]"}
ROUTES = [("/denoise", ONE), ("/denoise/batch", {"items": [ONE]}), ("/denoise/stream", ONE), (INFER, of())]


@pytest.mark.parametrize(("path", "fields"), ROUTES)
async def test_what_is_loaded_while_a_request_arrives_answers_it(
    service: Service, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, path: str, fields: dict[str, Any]
) -> None:
    new = Service(tiny_tokenizer, tiny_config)
    content = json.dumps(fields).encode()

    async def arriving() -> AsyncIterator[bytes]:
        yield content[:9]
        service.lifecycle.open(new.denoiser)
        yield content[9:]

    async with service.client() as client:
        answer = await client.post(path, content=arriving(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert (len(service.engine.jobs), bool(new.engine.jobs)) == (0, True)


async def test_what_the_open_inference_protocol_says_of_readiness(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    """Without a key of server and process, with one of the model."""
    service = Service(tiny_tokenizer, tiny_config, api_key="key")
    async with service.client() as client:

        async def told(path: str) -> tuple[int, Any]:
            response = await client.get(path)
            return response.status_code, response.json()

        assert await told("/v2/health/live") == (200, {"live": True})
        assert await told("/v2/health/ready") == (503, {"ready": False})
        assert (await told("/v2/models/tiny/ready"))[0] == 401
        client.headers["X-API-Key"] = "key"
        assert (await told("/v2/models/tiny/ready"))[0] == 503
        service.open()
        assert await told("/v2/health/ready") == (200, {"ready": True})
        for path in ("/v2/models/tiny", "/v2/models/tiny/versions/0123456789ab"):
            assert await told(f"{path}/ready") == (200, {"name": "tiny", "ready": True})
        await service.lifecycle.drain(0)
        assert await told("/v2/health/live") == (200, {"live": True})
        assert await told("/v2/health/ready") == (503, {"ready": False})
