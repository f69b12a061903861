"""A small client for the REST interface, sync and async. Needs httpx and pydantic, and no torch.

with Client("http://127.0.0.1:8000") as client:
    print(client.denoise("The album was [MASK] in 2004 and received positive [MASK] from critics.").text)
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.access import is_sendable
from service.rest.problem import BatchAnswer, BatchResult, Problem
from service.schema import DenoiseAnswer, DenoisePass, ModelCard

TIMEOUT_SECONDS = 60.0
MARGIN_SECONDS = 5.0
"""How long after its `timeout_ms` an answer may still arrive."""
MOST_ALLOWED_MS = 86_400_000
"""A longer `timeout_ms` does not lengthen the wait: the server refuses it, and sockets do not take it."""

JSON = {"Content-Type": "application/json"}

Item = str | Mapping[str, Any]
Body = TypeVar("Body", bound=BaseModel)


class ProblemError(Exception):
    """The server answered with an error; `problem` says which, and `retry_seconds` after how long to try again, if the
    server has said so: it does where it has no room (429) or is not ready (503).
    """

    def __init__(self, problem: Problem, retry_seconds: int | None = None) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_seconds = retry_seconds

    def __reduce__(self) -> tuple[type[Self], tuple[Problem, int | None]]:
        """By default pickle would pass the message as the problem, which breaks a pool of processes."""
        return type(self), (self.problem, self.retry_seconds)


class _Timeouts:
    """How long to wait: the client's own timeout, or longer where a request allows the server more (`timeout_ms`)."""

    _seconds: float

    def _timeout(self, *requests: Mapping[str, Any]) -> float:
        allowed = [request.get("timeout_ms") for request in requests]
        longest = max((ms for ms in allowed if isinstance(ms, int | float)), default=0)
        return max(self._seconds, min(longest, MOST_ALLOWED_MS) / 1e3 + MARGIN_SECONDS) if longest else self._seconds


class Client(_Timeouts):
    """Raises `ProblemError` for every error status; its type is `about:blank` if the body is no problem document but,
    say, a proxy's page. Raises `httpx.HTTPError` for errors of the connection; one of them is
    `httpx.RemoteProtocolError`, for a success without a valid answer and for a stream that is cut. Nothing is tried
    again. A key that a header cannot carry is a `ValueError`.

    `timeout_seconds` is the longest silence of the server, or longer where a request has a `timeout_ms`. Threads may
    share a client. It has 100 connections, for which further requests wait, no longer than for the server.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._seconds = timeout_seconds
        self._http = httpx.Client(
            base_url=base_url, headers=_headers(api_key), timeout=timeout_seconds, transport=transport
        )

    def denoise(self, text: str, **options: Any) -> DenoiseAnswer:
        """Restore one text; options are the fields of `DenoiseRequest`."""
        body = _json({"text": text, **options})
        answer = self._http.post("/denoise", content=body, headers=JSON, timeout=self._timeout(options))
        return _parsed(DenoiseAnswer, _checked(answer))

    def denoise_batch(self, items: Iterable[Item], **options: Any) -> list[BatchResult]:
        """Restore many texts: each item a text, or the fields of a `DenoiseRequest`; options are for all of them.

        An item that failed is a result with a `problem`; only what is wrong with the whole is raised.
        """
        batch = _batch(items, options)
        timeout = self._timeout(options, *batch["items"])
        answer = self._http.post("/denoise/batch", content=_json(batch), headers=JSON, timeout=timeout)
        return _parsed(BatchAnswer, _checked(answer)).results

    def denoise_stream(self, text: str, **options: Any) -> Generator[DenoisePass | DenoiseAnswer, None, None]:
        """Restore one text and see it after every pass; the answer comes last. Exhaust or close the stream: until then
        the server computes, and the connection is in use.
        """
        body, timeout = _json({"text": text, **options}), self._timeout(options)
        with self._http.stream("POST", "/denoise/stream", content=body, headers=JSON, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                _checked(response)
            events = _Events()
            for piece in response.iter_bytes():
                yield from events.after(piece)
            events.check_end()

    def model(self) -> ModelCard:
        """What is served: name, digest, configuration, limits, device."""
        return _parsed(ModelCard, _checked(self._http.get("/model")))

    def ready(self) -> bool:
        """Whether the server takes requests; raises `httpx.ConnectError` where nobody listens."""
        return self._http.get("/health/ready").status_code == httpx.codes.OK

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Timeouts):
    """`Client` for asyncio."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._seconds = timeout_seconds
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=_headers(api_key), timeout=timeout_seconds, transport=transport
        )

    async def denoise(self, text: str, **options: Any) -> DenoiseAnswer:
        """Restore one text; options are the fields of `DenoiseRequest`."""
        body = _json({"text": text, **options})
        answer = await self._http.post("/denoise", content=body, headers=JSON, timeout=self._timeout(options))
        return _parsed(DenoiseAnswer, _checked(answer))

    async def denoise_batch(self, items: Iterable[Item], **options: Any) -> list[BatchResult]:
        """See `Client.denoise_batch`."""
        batch = _batch(items, options)
        timeout = self._timeout(options, *batch["items"])
        answer = await self._http.post("/denoise/batch", content=_json(batch), headers=JSON, timeout=timeout)
        return _parsed(BatchAnswer, _checked(answer)).results

    async def denoise_stream(self, text: str, **options: Any) -> AsyncGenerator[DenoisePass | DenoiseAnswer, None]:
        """See `Client.denoise_stream`."""
        body, timeout = _json({"text": text, **options}), self._timeout(options)
        async with self._http.stream(
            "POST", "/denoise/stream", content=body, headers=JSON, timeout=timeout
        ) as response:
            if not response.is_success:
                await response.aread()
                _checked(response)
            events = _Events()
            async for piece in response.aiter_bytes():
                for event in events.after(piece):
                    yield event
            events.check_end()

    async def model(self) -> ModelCard:
        """See `Client.model`."""
        return _parsed(ModelCard, _checked(await self._http.get("/model")))

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return (await self._http.get("/health/ready")).status_code == httpx.codes.OK

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Events:
    """Parses server-sent events, which are always UTF-8: of each, a line with its name, then one with its document.

    Lines end at line feeds only. Python and httpx split at other characters too, which texts may contain.
    """

    def __init__(self) -> None:
        self._name = ""
        self._begun = b""  # the line that has not ended yet
        self._answered = False

    def after(self, piece: bytes) -> Iterator[DenoisePass | DenoiseAnswer]:
        """The events that this completes. Raises `ProblemError` for one that says the stream has failed."""
        *lines, self._begun = (self._begun + piece).split(b"\n")
        for line in lines:
            if (event := self._event(line)) is not None:
                yield event

    def _event(self, line: bytes) -> DenoisePass | DenoiseAnswer | None:
        field, _, value = line.rstrip(b"\r").partition(b": ")
        if field == b"event":
            self._name = value.decode("utf-8", "replace")
        if field != b"data":
            return None
        if self._name == "problem":
            raise ProblemError(_parsed(Problem, value))
        if self._name == "answer":
            self._answered = True
            return _parsed(DenoiseAnswer, value)
        return _parsed(DenoisePass, value) if self._name == "pass" else None  # unknown events are of a newer server

    def check_end(self) -> None:
        """Raises `httpx.RemoteProtocolError` if the stream was cut: the answer comes last."""
        if not self._answered:
            raise httpx.RemoteProtocolError("the stream ended without an answer")


def _batch(items: Iterable[Item], options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(items, str | bytes | Mapping):
        raise TypeError(f"items is a {type(items).__name__}: want several texts, or several mappings of fields")
    return {"items": [_fields(item, f"items[{index}]") for index, item in enumerate(items)], **options}


def _fields(item: Item, path: str) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        return dict(item)
    raise TypeError(f"{path} is a {type(item).__name__}: want a text, or a mapping of fields")


def _json(body: Mapping[str, Any]) -> bytes:
    """Lone surrogates escaped and NaN by its name, so that the server refuses them, and in a batch the one item."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def _parsed(kind: type[Body], document: str | bytes) -> Body:
    try:
        return kind.model_validate_json(document)
    except ValidationError as error:
        raise httpx.RemoteProtocolError(f"the server's answer is no {kind.__name__}: {error}") from error


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not api_key or not is_sendable(api_key):  # httpx would show it
        raise ValueError("api_key: want at least one character, printable ASCII only, and no space at either end")
    return {"Authorization": f"Bearer {api_key}"}


def _checked(response: httpx.Response) -> bytes:
    if response.is_success:
        return response.content
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # a proxy's error page, say
        detail = response.content.decode("utf-8", "replace")[:200]
        problem = Problem(type="about:blank", title=response.reason_phrase, status=response.status_code, detail=detail)
    raise ProblemError(problem, _retry_seconds(response.headers.get("Retry-After", "")))


def _retry_seconds(retry_after: str) -> int | None:
    """Proxies may name a time of day instead."""
    return int(retry_after) if retry_after.isdecimal() and len(retry_after) < 10 else None
