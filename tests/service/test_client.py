from __future__ import annotations

import httpx
import pytest

from service.client import AsyncClient, Client, ProblemError
from tests.fakes import Service


async def test_an_answer_and_a_problem(service: Service) -> None:
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        assert await client.ready()
        assert (await client.denoise("the [MASK]", max_steps=3)).text == "the fox"
        assert (await client.model()).name == "tiny"
        with pytest.raises(ProblemError, match="max_steps is 0") as error:
            await client.denoise("the [MASK]", max_steps=0)
    assert error.value.problem.status == 422
    assert [bad.field for bad in error.value.problem.errors] == ["max_steps"]


def test_the_sync_client_sends_its_key_and_reads_foreign_errors() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer open sesame"
        return httpx.Response(502, text="<h1>Bad gateway</h1>")

    with Client("http://rdt", api_key="open sesame", transport=httpx.MockTransport(answer)) as client:
        assert not client.ready()
        with pytest.raises(ProblemError, match="502 Bad Gateway: <h1>"):
            client.denoise("a")
