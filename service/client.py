"""A small client for the REST interface, sync and async. Needs httpx and pydantic, and no torch.

with Client("http://127.0.0.1:8000") as client:
    print(client.denoise("The quick brown [MASK] jumps.").text)
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from service.rest.problem import Problem
from service.schema import DenoiseAnswer, ModelCard

TIMEOUT_SECONDS = 60.0


class ProblemError(Exception):
    """The server answered with an error; `problem` says which."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem = problem


class Client:
    """Raises `ProblemError` for errors the server names and `httpx.HTTPError` for those of the wire."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url, headers=_headers(api_key), timeout=timeout_seconds, transport=transport
        )

    def denoise(self, text: str, **options: Any) -> DenoiseAnswer:
        """Restore one text; options are the fields of `DenoiseRequest`."""
        answer = self._http.post("/denoise", json={"text": text, **options})
        return DenoiseAnswer.model_validate_json(_checked(answer))

    def model(self) -> ModelCard:
        return ModelCard.model_validate_json(_checked(self._http.get("/model")))

    def ready(self) -> bool:
        return self._http.get("/health/ready").status_code == httpx.codes.OK

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=_headers(api_key), timeout=timeout_seconds, transport=transport
        )

    async def denoise(self, text: str, **options: Any) -> DenoiseAnswer:
        """Restore one text; options are the fields of `DenoiseRequest`."""
        answer = await self._http.post("/denoise", json={"text": text, **options})
        return DenoiseAnswer.model_validate_json(_checked(answer))

    async def model(self) -> ModelCard:
        return ModelCard.model_validate_json(_checked(await self._http.get("/model")))

    async def ready(self) -> bool:
        return (await self._http.get("/health/ready")).status_code == httpx.codes.OK

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _checked(response: httpx.Response) -> bytes:
    if response.is_success:
        return response.content
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # a proxy's error page, say
        problem = Problem(
            type="about:blank", title=response.reason_phrase, status=response.status_code, detail=response.text[:200]
        )
    raise ProblemError(problem)
