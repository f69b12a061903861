"""The HTTP interface over a fake engine: answers, health, the key, the playground."""

from __future__ import annotations

import asyncio
import hashlib
import re
from base64 import b64encode

import httpx
import pytest

from rdt_core import ModelConfig, Tokenizer
from service.engine.types import Job, Result
from service.errors import CODES, DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from service.rest.errors import STATUS, TITLE
from service.rest.playground import PAGE
from service.tracing import NoTracer
from tests.fakes import Service
from tests.service.rest.test_bad_input import problem_of

KEY = "s3cret-ключ"


async def test_one_text_one_answer(service: Service) -> None:
    async with service.client() as client:
        response = await client.post("/denoise", json={"text": "The quick [MASK]!", "top_k": 1, "trace": True})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json() == {
        "text": "The quick fox!",
        "corrupted_text": None,
        "steps": 2,
        "max_steps": 8,
        "halt_reason": "gate",
        "level": pytest.approx(1 / 3),
        "restored": [
            {"start": 10, "end": 13, "text": "fox", "probability": 0.5, "step": 2,
             "candidates": [{"text": "fox", "probability": 0.5}]}
        ],
        "trace": [{"step": 1, "level": 0.5}, {"step": 2, "level": pytest.approx(1 / 3)}],
        "timing_ms": {"queue": 250.0, "compute": 500.0, "total": 0.0},
        "model": "tiny@0123456789ab",
    }  # fmt: skip


async def test_options_reach_the_engine(service: Service) -> None:
    options = {"max_steps": 5, "threshold": 0.0, "halting": "settle", "top_k": 3, "restore": "all", "timeout_ms": 1500}
    async with service.client() as client:
        await client.post("/denoise", json={"text": "[mask]", **options})
    tokenizer_ids = service.engine.jobs[0].tokens
    assert service.engine.jobs == [
        Job(tokenizer_ids, [False, True, False], 5, 0.0, "settle", 3, True, deadline=service.clock.now + 1.5)
    ]


async def test_options_left_out_are_the_checkpoints(service: Service, tiny_config: ModelConfig) -> None:
    async with service.client() as client:
        await client.post("/denoise", json={"text": "a", "max_steps": None, "threshold": None, "halting": None})
    job = service.engine.jobs[0]
    assert (job.max_steps, job.threshold, job.halting) == (
        tiny_config.max_steps, tiny_config.threshold, tiny_config.halting,
    )  # fmt: skip
    assert job.deadline is None


@pytest.mark.parametrize(
    ("error", "status", "title", "retry"),
    [
        (ResourceExhausted("full", "queue_requests"), 429, "The queue is full", "1"),
        (ResourceExhausted("short", "memory"), 429, "The server is short of memory", "60"),
        (Unavailable("draining", "draining"), 503, "The server takes no requests now", "1"),
        (DeadlineExceeded("late"), 504, "The deadline passed before there was an answer", None),
        (Internal("broken"), 500, "Internal error", None),
    ],
)
async def test_engine_errors_become_problems(
    service: Service, error: Exception, status: int, title: str, retry: str | None
) -> None:
    service.engine.error = error
    async with service.client() as client:
        response = await client.post("/denoise", json={"text": "a"})
    assert problem_of(response, status)["title"] == title
    assert response.headers.get("retry-after") == retry
    assert "www-authenticate" not in response.headers
    leaving = isinstance(error, Unavailable)
    assert response.headers.get("connection") == ("close" if leaving else None), "the next try is another server's"


async def test_a_full_queue_refuses_before_tokenising(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.engine.full = ResourceExhausted("full", "queue_requests")
    monkeypatch.setattr("service.denoiser.encode", lambda *_: pytest.fail("tokenised"))
    async with service.client() as client:
        problem_of(await client.post("/denoise", json={"text": "a"}), 429)


async def test_a_bug_is_a_problem_document_without_its_details(service: Service) -> None:
    service.engine.error = RuntimeError("a secret of the house")
    async with service.client() as client:
        response = await client.post("/denoise", json={"text": "a"})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "secret" not in response.text


def test_every_code_has_a_status_and_a_title() -> None:
    assert set(STATUS) == set(TITLE) == set(CODES)


async def test_health_follows_the_lifecycle(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> None:
    service = Service(tiny_tokenizer, tiny_config)
    async with service.client() as client:

        async def ready() -> tuple[int, str]:
            response = await client.get("/health/ready")
            return response.status_code, response.json()["status"]

        assert await ready() == (503, "loading")
        problem_of(await client.post("/denoise", content=b"not even read"), 503)
        problem_of(await client.get("/model"), 503)
        service.open()
        assert await ready() == (200, "ready")
        service.engine.ready = False
        assert await ready() == (503, "failed")
        service.engine.ready = True
        await service.lifecycle.drain(7.0, service.engine)
        assert await ready() == (503, "draining")
        assert service.engine.grace_seconds == pytest.approx(7.0, abs=1.0)
        problem_of(await client.post("/denoise", json={"text": "a"}), 503)
        assert (await client.get("/health/live")).status_code == 200
    assert [service.sample("rdt_refused_total", reason=reason) for reason in ("loading", "draining")] == [1, 1]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}".encode()}, 200),
        ({"Authorization": f"bearer  {KEY}".encode()}, 200),
        ({"X-API-Key": KEY.encode()}, 200),
        ({}, 401),
        ({"Authorization": b"Bearer"}, 401),
        ({"Authorization": b"Bearer wrong"}, 401),
        ({"Authorization": f"Basic {KEY}".encode()}, 401),
        ({"X-API-Key": KEY.encode() + b"x"}, 401),
        ({"X-API-Key": b"\xff"}, 401),
    ],
)
async def test_the_key(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, headers: dict[str, bytes], status: int
) -> None:
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY).open()
    async with service.client() as client:
        for path in ("/model", "/metrics", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == status
        response = await client.post("/denoise", json={"text": "a"}, headers=headers)
        if status == 401:
            problem_of(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
            problem_of(await client.get("/nowhere", headers=headers), 401)
            assert service.sample("rdt_requests_total", transport="rest", outcome="unauthenticated") == 5
        assert response.status_code == status
        open_paths = ("/health/live", "/health/ready", "/")
        assert [(await client.get(path)).status_code for path in open_paths] == [200, 200, 200]


async def test_the_beginning_and_the_end_of_a_server_pass_every_door(
    tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    """Ray Serve tells the application of them."""
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY, tracer=NoTracer())
    told, answers = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive() -> dict[str, object]:
        return told.pop(0)

    async def send(message: dict[str, object]) -> None:
        answers.append(message["type"])

    await service.app({"type": "lifespan"}, receive, send)  # type: ignore[arg-type] # plain dicts
    assert answers == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_callers_request_id_is_kept_if_it_is_sane(service: Service) -> None:
    async with service.client() as client:
        service.engine.error = RuntimeError("a bug")
        crashed = await client.post("/denoise", json={"text": "a"}, headers={"X-Request-Id": "abc-124"})
        assert crashed.headers["x-request-id"] == problem_of(crashed, 500)["request_id"] == "abc-124"
        kept = await client.get("/nowhere", headers={"X-Request-Id": "abc-123"})
        replaced = await client.get("/nowhere", headers={"X-Request-Id": "a b<script>"})
    assert problem_of(kept, 404)["request_id"] == "abc-123"
    assert re.fullmatch("[0-9a-f]{32}", problem_of(replaced, 404)["request_id"])


async def test_a_caller_who_leaves_cancels_the_work(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    async def never(*_: object) -> Result:
        try:
            await asyncio.Event().wait()
            raise AssertionError
        finally:
            ended.set()

    monkeypatch.setattr(service.engine, "submit", never)
    messages = [{"type": "http.request", "body": b'{"text": "a"}'}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": "/denoise", "raw_path": b"/denoise", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(_message: object) -> None:
        pass

    await asyncio.wait_for(service.app(scope, receive, send), timeout=5)  # type: ignore[arg-type] # plain dicts
    await asyncio.wait_for(ended.wait(), timeout=5)
    assert service.sample("rdt_requests_total", transport="rest", outcome="cancelled") == 1


async def test_the_playground_allows_itself_and_nothing_else(service: Service) -> None:
    async with service.client() as client:
        response = await client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    wanted = {"connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "img-src data:"}
    assert wanted <= {*policy.split("; ")}
    assert response.content == PAGE.read_bytes()
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-content-type-options"] == "nosniff"
    for element in ("script", "style"):
        inline = re.findall(f"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
        assert len(inline) == 1
        assert b64encode(hashlib.sha256(inline[0].encode()).digest()).decode() in policy
    assert re.findall(r"(?:src|href)\s*=\s*(\S+?)>", response.text) == ['"data:,"']
    assert not re.search(r"\sstyle=|\son\w+=|//\w", response.text)


async def test_the_playground_serves_keyboards_screens_and_scripts_of_all_kinds(service: Service) -> None:
    async with service.client() as client:
        page = (await client.get("/")).text
    assert page.count('dir="auto"') == 2, "the text that is typed and the one that is shown may run from right to left"
    assert "color: var(--faint)" not in re.findall(r"^mark.*", page, re.MULTILINE)[-1], "too pale on its ground"
    assert ".disabled" not in page, "a button that is disabled loses the focus"
    assert re.findall(r"restore\(\)", page) == ["restore()"] * 2, "Ctrl + Enter submits as the button does"
    assert ".requestSubmit()" in page, "with what the browser says of a number that is none"
    assert "ended before the answer" in page, "also where the connection ends in good order"
    assert 'get("Content-Type") === "application/problem+json"' in page, "a proxy's page is not read as a problem"


async def test_the_model_card(service: Service, tiny_config: ModelConfig) -> None:
    async with service.client() as client:
        response = await client.get("/model")
    assert response.headers["content-type"] == "application/json"
    card = response.json()
    assert card["digest"] == "0123456789abcdef"
    assert card["configuration"]["max_seq_len"] == tiny_config.max_seq_len


async def test_under_a_prefix_the_same_paths_are_open(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> None:
    service = Service(tiny_tokenizer, tiny_config, api_key=KEY).open()
    transport = httpx.ASGITransport(service.app, root_path="/rdt")
    async with httpx.AsyncClient(transport=transport, base_url="http://rdt/rdt") as client:
        statuses = [(await client.get(path)).status_code for path in ("/health/live", "/health/ready", "/", "/metrics")]
    assert statuses == [200, 200, 200, 401]
