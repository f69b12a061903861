"""Lines of the log: what they hold, and what they cannot be made to hold."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO

import grpc
import httpx
import pytest
import uvicorn

from rdt_core import ModelConfig, Tokenizer
from service import calls
from service.errors import Internal
from service.process.logs import JsonLines, TextLines, complain, fields
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from tests.fakes import Service

FORGED = "x\n2026-11-23 01:11:00,123 INFO service: all is well\r\x1b[2J\u2028\x85end"
KEY, TEXT = "open-sesame", "a text of no concern to the log"


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("service.x", logging.WARNING, __file__, 1, message, arguments, None)
    made.__dict__.update(created=0.25, msecs=250.0, **more)
    return made


def raised(message: str) -> logging.LogRecord:
    try:
        raise ValueError(message)
    except ValueError:
        return record("it broke", exc_info=sys.exc_info())


@pytest.fixture
def call() -> Iterator[calls.Call]:
    token = calls.current.set(calls.Call("abc-1", trace_id="0af7"))
    yield calls.Call("abc-1")
    calls.current.reset(token)


def test_a_text_line() -> None:
    line = TextLines().format(record("%d of %s", 3, "four"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,250 WARNING service\.x: 3 of four", line)


@pytest.mark.usefixtures("call")
def test_a_text_line_inside_a_call() -> None:
    assert TextLines().format(record("so")).endswith(" WARNING service.x [abc-1]: so")


def test_a_json_line() -> None:
    assert json.loads(JsonLines().format(record("%d of %s", 3, "four", **fields(status=200)))) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "warning",
        "logger": "service.x",
        "message": "3 of four",
        "status": 200,
    }


@pytest.mark.usefixtures("call")
def test_a_json_line_inside_a_call() -> None:
    entry = json.loads(JsonLines().format(raised("why")))
    assert (entry["request_id"], entry["trace_id"]) == ("abc-1", "0af7")
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ValueError: why")


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_a_message_is_one_line_whatever_is_in_it(formatter: logging.Formatter) -> None:
    line = formatter.format(record("caller said %s", FORGED))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert r"x\n2026" in line


def test_a_traceback_cannot_pass_for_a_line() -> None:
    first, *below = TextLines().format(raised(FORGED)).splitlines()
    assert first.endswith(" WARNING service.x: it broke")
    assert any("all is well" in line for line in below)
    assert all(line.startswith("  ") and line.isprintable() for line in below)
    assert len(JsonLines().format(raised(FORGED)).splitlines()) == 1


def test_a_stack_that_was_asked_for_is_told() -> None:
    entry = json.loads(JsonLines().format(record("so", stack_info="Stack:\n  here")))
    assert entry["exception"] == "Stack:\n  here"


def test_why_a_program_ends_is_a_line_like_others_only_among_json(capsys: pytest.CaptureFixture[str]) -> None:
    root, out = logging.getLogger(), StringIO()
    for formatter in (TextLines(), JsonLines()):
        handler = logging.StreamHandler(out)
        handler.setFormatter(formatter)
        root.addHandler(handler)
        try:
            complain("rdt-serve", "cannot start:\nno such file")
        finally:
            root.removeHandler(handler)
    assert capsys.readouterr().err == "rdt-serve: cannot start: no such file\n"
    said = json.loads(out.getvalue())
    assert (said["level"], said["logger"], said["message"]) == ("critical", "rdt-serve", "cannot start: no such file")


def test_grpc_quotes_no_metadata_blames_nobody_for_a_caller_who_left_and_adds_no_line_to_each_call() -> None:
    """grpcio logs metadata that is no text whole, and it may be a key in another encoding."""
    script = (
        "import logging; from service.process import logs; logs.configure('debug', 'json');"
        "log = logging.getLogger('grpc._cython.cygrpc');"
        "log.error('Invalid encoding on %s', b's\\xffcret');"
        "log.exception('ExecuteBatchError raised in core by servicer method [%s]', '/rdt.v1.Denoiser/Denoise');"
        "log.debug('[_cygrpc] Loaded running loop: id(loop)=%s', 1);"
        "log.error('something else')"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (line,) = run.stderr.splitlines()
    assert json.loads(line)["message"] == "something else"


def test_grpcs_core_does_not_write_past_the_log() -> None:
    script = "import os, service.rpc; print(os.environ['GRPC_VERBOSITY'])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "NONE\n"


def test_warnings_are_json_too() -> None:
    script = """
import logging, warnings
from service.process import logs
logs.configure("info", "json")
warnings.warn("beware")
logging.getLogger("a").info("b")
logging.getLogger("a").debug("not shown")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    entries = [json.loads(line) for line in run.stderr.splitlines()]
    assert [entry["logger"] for entry in entries] == ["py.warnings", "a"]
    assert "beware" in entries[0]["message"]


class Log:
    """Everything logged from now on at any level, as one string."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(formatter)
        self.handler.addFilter(lambda entry: not entry.name.startswith("http"))  # the test's own client

    def __str__(self) -> str:
        return self._stream.getvalue()

    def entries(self, logger: str) -> list[dict[str, object]]:
        return [entry for line in str(self).splitlines() if (entry := json.loads(line))["logger"] == logger]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    root, log = logging.getLogger(), Log(JsonLines())
    monkeypatch.setattr(root, "level", logging.DEBUG)
    root.manager._clear_cache()  # type: ignore[attr-defined] # of what each logger is enabled for
    root.addHandler(log.handler)
    yield log
    root.removeHandler(log.handler)
    monkeypatch.undo()
    root.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.fixture
def observed(log: Log, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> Service:  # noqa: ARG001 - made after it
    return Service(tiny_tokenizer, tiny_config, api_key=KEY).open()


async def post(client: httpx.AsyncClient, request_id: str, **body: object) -> httpx.Response:
    headers = {"X-API-Key": KEY, "X-Request-Id": request_id}
    return await client.post("/denoise", json={"text": TEXT, **body}, headers=headers)


async def test_a_line_for_every_http_request(observed: Service, log: Log) -> None:
    async with observed.client() as client:
        await post(client, "one")
        await post(client, "two", max_steps=0)
        await client.post("/denoise", content=b"{", headers={"X-API-Key": KEY, "Content-Type": "application/json"})
        await client.get(f"/nowhere?{KEY}", headers={"X-API-Key": KEY})
        await client.get("/model")
        await client.get("/v2/models/other", headers={"X-API-Key": KEY})
        observed.engine.error = RuntimeError("broken")
        await post(client, "five")
    lines = log.entries("service.rest.observe")
    assert f" after {float(str(lines[0]['duration_ms'])):.1f} ms" in str(lines[0]["message"])
    assert all(0 < float(str(line["duration_ms"])) < 10_000 for line in lines)
    told = [tuple(line[name] for name in ("method", "route", "status", "outcome")) for line in lines]
    assert told == [
        ("POST", "/denoise", 200, "ok"),
        ("POST", "/denoise", 422, "invalid_argument"),
        ("POST", "/denoise", 400, "malformed"),
        ("GET", "", 404, "http_404"),
        ("GET", "", 401, "unauthenticated"),
        ("GET", "/v2/models/{name}", 404, "not_found"),
        ("POST", "/denoise", 500, "internal"),
    ]
    assert "trace_id" not in lines[0], "nothing is traced"
    ids = [line["request_id"] for line in lines]
    assert (ids[0], ids[1], ids[6]) == ("one", "two", "five")
    assert re.fullmatch(r"POST /denoise: 200 ok after [\d.]+ ms", str(lines[0]["message"]))
    assert KEY not in str(log)
    assert TEXT not in str(log)


async def call_grpc(channel: grpc.aio.Channel, request_id: str, key: str = KEY, **fields: object) -> str | None:
    """The id that comes back."""
    metadata = (("x-api-key", key), ("x-request-id", request_id))
    call = DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT, **fields), metadata=metadata)
    await call.code()
    return dict(await call.trailing_metadata()).get("x-request-id")


async def test_a_line_for_every_grpc_call(observed: Service, log: Log) -> None:
    async with observed.channel() as channel:
        assert await call_grpc(channel, "one") == "one"
        assert await call_grpc(channel, "two", max_steps=0) == "two"
        assert await call_grpc(channel, "three", key="wrong") == "three"
        observed.engine.error = RuntimeError("broken")
        assert await call_grpc(channel, "four") == "four"
        assert re.fullmatch("[0-9a-f]{32}", await call_grpc(channel, "a b<script>") or "")
    lines = log.entries("service.rpc.calls")
    told = [(line["request_id"], line["method"], line["outcome"]) for line in lines[:4]]
    assert told == [
        ("one", "Denoise", "ok"),
        ("two", "Denoise", "invalid_argument"),
        ("three", "Denoise", "unauthenticated"),
        ("four", "Denoise", "internal"),
    ]
    assert all(0 < float(str(line["duration_ms"])) < 10_000 for line in lines)
    assert f"Denoise: ok after {float(str(lines[0]['duration_ms'])):.1f} ms" == lines[0]["message"]
    (crash,) = (line for line in log.entries("service.rpc.errors") if line["request_id"] == "four")
    assert "RuntimeError: broken" in str(crash["exception"])
    assert KEY not in str(log)
    assert TEXT not in str(log)


async def test_a_request_that_the_end_of_the_server_cancels_says_so(observed: Service, log: Log) -> None:
    observed.engine.held = asyncio.Event()
    async with observed.client() as client:
        asked = asyncio.create_task(post(client, "one"))
        await observed.until_live(1)
        asked.cancel()
        await asyncio.wait([asked])
    (line,) = log.entries("service.rest.observe")
    assert (line["request_id"], line["outcome"]) == ("one", "cancelled")


@pytest.mark.parametrize("error", [Internal("broken"), RuntimeError("broken")])
async def test_a_stream_that_fails_midway_says_so(observed: Service, log: Log, error: Exception) -> None:
    observed.engine.error, observed.engine.error_after_pass = error, 1
    async with observed.client() as client:
        headers = {"X-API-Key": KEY}
        response = await client.post("/denoise/stream", json={"text": TEXT}, headers=headers)
    assert "event: problem" in response.text
    (line,) = log.entries("service.rest.observe")
    assert (line["status"], line["outcome"]) == (200, "internal")


async def test_a_stream_that_is_left_midway_says_so(observed: Service, log: Log) -> None:
    observed.engine.held = asyncio.Event()
    body = json.dumps({"text": TEXT}).encode()
    sent, begun = [{"type": "http.request", "body": body}], asyncio.Event()

    async def receive() -> dict[str, object]:
        if not sent:
            await begun.wait()
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            begun.set()

    scope = {
        "type": "http", "method": "POST", "path": "/denoise/stream", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"x-api-key", KEY.encode())],
    }  # fmt: skip
    await asyncio.wait_for(observed.app(scope, receive, send), timeout=5)  # type: ignore[arg-type] # plain dicts
    (line,) = log.entries("service.rest.observe")
    assert (line["status"], line["outcome"]) == (200, "cancelled")


async def test_a_crash_is_logged_under_its_id(observed: Service, log: Log) -> None:
    """By the server around the application, once that has been left."""
    observed.engine.error = RuntimeError("broken")
    server = uvicorn.Server(uvicorn.Config(observed.app, port=0, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            assert (await post(client, "one")).status_code == 500
        server.should_exit = True
        await serving
    (crash,) = (line for line in log.entries("uvicorn.error") if line["level"] == "error")
    assert crash["request_id"] == "one"
    assert crash["message"] == "Exception in ASGI application"
    assert "RuntimeError: broken" in str(crash["exception"])


async def test_calls_at_the_same_time_keep_their_ids(observed: Service, log: Log) -> None:
    observed.engine.held = asyncio.Event()
    async with observed.client() as client:
        asked = [asyncio.create_task(post(client, f"call-{n}")) for n in range(5)]
        await observed.until_live(5)
        observed.engine.held.set()
        await asyncio.gather(*asked)
    assert sorted(str(line["request_id"]) for line in log.entries("service.rest.observe")) == [
        f"call-{n}" for n in range(5)
    ]


async def test_below_debug_nothing_is_told_of_requests(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with service.client() as client, service.channel() as channel:
        assert (await client.post("/denoise", json={"text": TEXT})).status_code == 200
        assert await call_grpc(channel, "one") == "one"
    assert [entry.name for entry in caplog.records if entry.name.startswith("service")] == []
