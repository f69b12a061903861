"""Where spans go: to a collector that is there, to one that is not, and nowhere at all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest

from rdt_core import ModelConfig, Tokenizer
from service import cli
from service.tracing import NO_TRACER, Tracer
from service.tracing.opening import TracingError, open_tracer
from tests.fakes import Service

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")

from tests.collectors import Collector, collecting, nobody, silent

ServiceOf = Callable[[Tracer], Service]
TEXT = "the [MASK] dog"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def service_of(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> ServiceOf:
    return lambda tracer: Service(tiny_tokenizer, tiny_config, tracer=tracer).open()


async def test_spans_reach_a_collector(service_of: ServiceOf) -> None:
    collector = Collector()
    with collecting(collector) as endpoint:
        tracer = open_tracer(endpoint)
        async with service_of(tracer).client() as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            for _ in range(3):
                await client.post("/denoise", json={"text": TEXT}, headers=headers)
        await asyncio.to_thread(tracer.close)
    (request,) = collector.requests
    (sent,) = request.resource_spans
    assert ("service.name", "rdt") in [(item.key, item.value.string_value) for item in sent.resource.attributes]
    spans = [span for scope in sent.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["POST /denoise"] * 3
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in spans} == {(TRACE, PARENT)}
    assert "dog" not in str(request)


@pytest.mark.parametrize("collector", [nobody, silent])
async def test_a_collector_that_is_away_costs_spans_only(
    service_of: ServiceOf, monkeypatch: pytest.MonkeyPatch, collector: Callable[[], AbstractContextManager[str]]
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")  # ms: it is trying while we ask
    monkeypatch.setattr("service.tracing.otel.CLOSE_SECONDS", 0.2)
    with collector() as endpoint:
        tracer = open_tracer(endpoint)
        async with service_of(tracer).client() as client, asyncio.timeout(5):
            for _ in range(20):
                assert (await client.post("/denoise", json={"text": TEXT})).status_code == 200
                await asyncio.sleep(0.005)
        began = time.monotonic()
        await asyncio.to_thread(tracer.close)
        assert time.monotonic() - began < 1


async def test_without_an_endpoint_requests_are_as_ever(service: Service) -> None:
    assert service.denoiser._tracer is NO_TRACER is open_tracer(None)
    assert all("Observer" not in repr(middleware) for middleware in service.app.user_middleware)
    async with service.client() as client:
        assert (await client.post("/denoise", json={"text": TEXT})).status_code == 200
    assert service.engine.jobs[0].tokens


def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    monkeypatch.delitem(sys.modules, "service.tracing.otel", raising=False)


def test_an_endpoint_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_extra(monkeypatch)
    with pytest.raises(TracingError, match=r"pip install '\.\[otel\]'"):
        open_tracer("http://127.0.0.1:4317")


def test_another_module_that_is_missing_is_not_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "service.version", None)
    monkeypatch.delitem(sys.modules, "service.tracing.otel", raising=False)
    with pytest.raises(ModuleNotFoundError, match="service"):
        open_tracer("http://127.0.0.1:4317")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "abc"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "foo"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "abc"),
    ],
)
def test_a_variable_that_the_library_cannot_read_is_a_bad_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TracingError, match=r"look at the OTEL_\* variables: "):
        open_tracer("http://127.0.0.1:4317")


def test_a_variable_that_is_read_on_importing_is_a_bad_setting_too() -> None:
    script = (
        "from service.tracing.opening import TracingError, open_tracer\ntry: open_tracer('http://127.0.0.1:4317')\n"
    )
    script += "except TracingError as error: print(error)"
    environment = os.environ | {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "look at the OTEL_* variables" in run.stdout


def test_the_command_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: object
) -> None:
    without_the_extra(monkeypatch)
    flags: Sequence[str] = ("--checkpoint", str(tiny_checkpoint), "--http_port", "0", "--grpc_port", "0")
    assert cli.serve([*flags, "--otel_endpoint", "http://127.0.0.1:4317"]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("rdt-serve: otel_endpoint (RDT_OTEL_ENDPOINT)")
    assert complaint.endswith("pip install '.[otel]' in the project's folder")


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4317", "ftp://a", "http://", "http://a b", "http://a/v1/traces"])
def test_a_bad_endpoint_is_named(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.serve(["--otel_endpoint", endpoint]) == 2
    assert "otel_endpoint (RDT_OTEL_ENDPOINT)" in capsys.readouterr().err
