"""A caller who hangs up frees the engine, whichever route it waits on: over a real socket, and at the level of ASGI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.fakes import Service
from tests.service.test_open_inference import INFER, of

ONE: dict[str, Any] = {"text": "a"}
ROUTES = [
    ("/denoise", ONE, 1), ("/denoise/batch", {"items": [ONE] * 3}, 3), ("/denoise/stream", ONE, 1), (INFER, of(), 2),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "n_jobs"), ROUTES)
async def test_a_socket_that_closes(service: Service, port: int, path: str, body: Any, n_jobs: int) -> None:
    service.engine.held = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: rdt\r\nContent-Type: application/json\r\n".encode())
    writer.write(f"Content-Length: {len(content)}\r\n\r\n{content}".encode())
    await service.until_live(n_jobs)
    assert service.engine.n_left == 0
    writer.close()
    await service.until_live(0)
    assert service.engine.n_left == n_jobs
    assert service.sample("rdt_requests_total", transport="rest", outcome="cancelled") == n_jobs


@pytest.mark.parametrize(("path", "body", "n_jobs"), ROUTES)
async def test_a_disconnect(service: Service, path: str, body: Any, n_jobs: int) -> None:
    service.engine.held = asyncio.Event()
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    answering = asyncio.create_task(service.app(scope, receive, send))  # type: ignore[arg-type] # plain dicts
    await service.until_live(n_jobs)
    async with asyncio.timeout(5):
        while path == "/denoise/stream" and len(sent) < 2:  # in the middle of it
            await asyncio.sleep(0.005)
        gone.set()
        await answering
    assert service.engine.live == 0
    assert service.engine.n_left == n_jobs


async def test_a_stream_before_its_first_pass(service: Service, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def queued(*_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    monkeypatch.setattr(service.engine, "submit", queued)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /denoise/stream HTTP/1.1\r\nHost: rdt\r\nContent-Type: application/json\r\n")
    writer.write(b'Content-Length: 13\r\n\r\n{"text": "a"}')
    async with asyncio.timeout(5):
        await begun.wait()
        writer.close()
        await left.wait()


async def test_a_stream_whose_caller_does_not_read_it(service: Service) -> None:
    """Over when the response is, not some time later."""
    service.engine.held = asyncio.Event()
    messages = [{"type": "http.request", "body": b'{"text": "a"}'}]
    sending = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await sending.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "POST", "path": "/denoise/stream", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await asyncio.wait_for(service.app(scope, receive, send), 5)  # type: ignore[arg-type] # plain dicts
    assert (service.engine.live, service.engine.n_left) == (0, 1)
