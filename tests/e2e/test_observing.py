"""What a real server process tells of its requests: JSON on stderr, spans to a collector."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_server import Server, server, wait_until_ready

pytestmark = pytest.mark.e2e

FLAGS = ("--log_format", "json", "--log_level", "debug")


def entries(running: Server) -> list[dict[str, object]]:
    """Every line there is; fails on one that is no JSON object."""
    read = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in read)
    return read


def end(running: Server) -> float:
    """Seconds from SIGTERM to a good end."""
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=10) == 0
    return time.monotonic() - began


def test_every_line_is_json_and_names_its_request_and_spans_reach_a_collector(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")
    from tests.collectors import Collector, collecting  # noqa: PLC0415 - needs the extra

    collector = Collector()
    with collecting(collector) as endpoint:
        flags = ("--checkpoint", str(tiny_checkpoint), "--otel_endpoint", endpoint, *FLAGS)
        with server(tmp_path / "log", *flags) as running, wait_until_ready(running):
            for request_id, text in (
                ("first", b"a [MASK]"),
                ("second", "a secret\ud83d".encode(errors="surrogatepass")),
            ):
                headers = {"X-Request-Id": request_id, "Content-Type": "application/json"}
                httpx.post(f"{running.url}/denoise", content=b'{"text": "' + text + b'"}', headers=headers)
            end(running)
            told = {
                entry["request_id"]: entry for entry in entries(running) if entry["logger"] == "service.rest.observe"
            }
            assert "secret" not in running.log.read_text()
    assert told["first"]["message"] == f"POST /denoise: 200 ok after {told['first']['duration_ms']:.1f} ms"
    assert told["second"]["outcome"] == "malformed"

    scopes = [scope for asked in collector.requests for of in asked.resource_spans for scope in of.scope_spans]
    first, second = (
        [span for scope in scopes for span in scope.spans if span.trace_id.hex() == told[name]["trace_id"]]
        for name in ("first", "second")
    )
    assert len(second) == 1
    (span,) = first
    assert span.name == "POST /denoise"
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["rdt.compute_ms"].double_value > 0
    times = [event.time_unix_nano for event in span.events]
    assert times == sorted(times)
    assert span.start_time_unix_nano <= times[0] <= times[-1] <= span.end_time_unix_nano


def test_a_server_ends_promptly_without_its_collector(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")
    from tests.collectors import nobody  # noqa: PLC0415 - needs the extra

    with nobody() as endpoint:
        flags = ("--checkpoint", str(tiny_checkpoint), "--otel_endpoint", endpoint, *FLAGS)
        with server(tmp_path / "log", *flags) as running, wait_until_ready(running):
            assert httpx.post(f"{running.url}/denoise", json={"text": "a [MASK]"}).is_success
            assert end(running) < 5
            assert entries(running)
