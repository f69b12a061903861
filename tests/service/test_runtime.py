"""The whole server inside this process: from settings to a bound port, and down again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import Tensor

from rdt_core import RDT, Packing, State, checkpoint
from rdt_core.devices import pick_device
from service import cli, hosting, runtime
from service.client import AsyncClient, ProblemError
from service.metrics import Metrics
from service.process.addresses import address
from service.runtime import listen, serve
from service.settings import Settings
from tests.fakes import FakeClock

pytestmark = pytest.mark.usefixtures("_log_everything")


@pytest.fixture
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def settings_for(checkpoint: Path, **changes: object) -> Settings:
    return Settings(checkpoint=checkpoint, device="cpu", http_port=0, grpc_port=0, threads=1, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[tuple[AsyncClient, asyncio.Task[int]]]:
    """A server that takes requests until this ends, a client for it, and the task that ends with its exit status."""
    serving = asyncio.create_task(serve(settings))
    async with asyncio.timeout(10):
        while (found := re.search(r"listening on (http://\S+)", caplog.text)) is None:
            await asyncio.sleep(0.01)
        async with AsyncClient(found[1]) as client:
            while not await client.ready():
                await asyncio.sleep(0.01)
            yield client, serving
    if not serving.done():
        os.kill(os.getpid(), signal.SIGTERM)
        await serving


async def test_the_settings_reach_the_model_card(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(tiny_checkpoint, max_steps_limit=7, max_top_k=3)
    async with running(settings, caplog) as (client, serving):
        card = await client.model()
        with pytest.raises(ProblemError, match="from 1 to 7"):
            await client.denoise("a", max_steps=8)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await serving == 0
    assert (card.limits["max_steps"], card.limits["top_k"]) == (7, 3)
    assert (card.name, card.device, card.precision) == ("tiny", "cpu", "fp32")
    assert re.fullmatch(r"[0-9a-f]{64}", card.digest)
    assert card.n_parameters > 0
    assert re.search(rf"ready after [\d.]+ s: tiny@{card.digest[:12]} on cpu", caplog.text)


def test_nobody_asks_for_more_candidates_than_there_are_words(tiny_checkpoint: Path) -> None:
    loaded = checkpoint.load(tiny_checkpoint)
    loaded.model.config = loaded.model.config.with_changes(vocab_size=19)
    settings = settings_for(tiny_checkpoint, max_top_k=20)
    denoiser = hosting.build_denoiser(loaded, Mock(), settings, Metrics(FakeClock()))
    assert denoiser.card.limits["top_k"] == 19


async def test_the_grace_period_is_the_longest_wait(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(tiny_checkpoint, grace_seconds=0.1, max_steps_limit=10**9)
    async with running(settings, caplog) as (client, serving):
        endless = asyncio.create_task(client.denoise("[MASK]", max_steps=10**9, threshold=0))
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ProblemError, match="shut down before"):
            await endless
        assert await serving == 0


async def test_a_signal_while_loading_ends_with_0(tiny_checkpoint: Path) -> None:
    serving = asyncio.create_task(serve(settings_for(tiny_checkpoint)))
    await asyncio.sleep(0)  # the signal handlers are in place before the first wait
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(serving, timeout=10) == 0


async def test_a_reload_that_does_not_end_before_the_server_is_refused(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "FLUSH_SECONDS", 0.2)
    begun, over = threading.Event(), threading.Event()

    def hangs(*_: object) -> bool:
        begun.set()
        return over.wait(10)

    async with running(settings_for(tiny_checkpoint, admin_key="adm1n"), caplog) as (client, serving):
        monkeypatch.setattr(hosting, "has_digest", hangs)
        reloading = asyncio.create_task(client._http.post("/model/reload", headers={"X-API-Key": "adm1n"}))
        await asyncio.to_thread(begun.wait, 5)
        os.kill(os.getpid(), signal.SIGTERM)
        answer = await reloading
        assert await serving == 0
        over.set()
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:rdt:problem:unavailable")
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_checkpoint_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing.pt"
    assert await asyncio.wait_for(serve(settings_for(path)), timeout=10) == 1
    assert capsys.readouterr().err == f"rdt-serve: cannot start: {path}: no such file\n"


async def test_warming_is_no_load(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that holds one request starts with any number of replicas, and no tick of the warm-up is counted."""
    settings = settings_for(tiny_checkpoint, replicas=3, max_waiting=1, max_waiting_tokens=1)
    async with running(settings, caplog) as (client, _):
        await client.denoise("a [MASK]", max_steps=1)
        assert "rdt_tick_tokens_count 1.0" in (await client._http.get("/metrics")).text


async def test_warming_leaves_nothing_out_of_a_pass(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a last pass spares would be slow when it is first met."""
    computed: list[object] = []
    original = RDT.forward

    def forward(model: RDT, state: State, packing: Packing, rows: Tensor | None = None) -> State:
        computed.append(rows)
        return original(model, state, packing, rows)

    monkeypatch.setattr(RDT, "forward", forward)
    async with running(settings_for(tiny_checkpoint), caplog):
        pass
    assert len(computed) > 2
    assert set(computed) == {None}


def test_addresses_are_written_as_in_urls() -> None:
    assert address("127.0.0.1", 80) == "127.0.0.1:80"
    assert address("::1", 80) == "[::1]:80"


def test_accepted_connections_send_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_in_use_is_one_line(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.serve(["--checkpoint", str(tiny_checkpoint), "--http_port", str(port)]) == 1
        assert cli.serve(["--checkpoint", str(tiny_checkpoint), "--http_port", "0", "--grpc_port", str(port)]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert not any("add_port" in line for line in lines), "gRPC's core has its own form, which is no log line"
    complaints = [line for line in lines if line.startswith(f"rdt-serve: cannot listen on 127.0.0.1:{port}: ")]
    assert len(complaints) == 2, lines


@pytest.mark.parametrize("name", ["tpu", "cuda:4096", "meta", "cuda:-1"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device is {name}"):
        pick_device(name)
