"""Checkpoint files that are not what they seem, and file systems that do not answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from rdt_core import checkpoint
from service.errors import FailedPrecondition
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.runtime import Reloader
from service.settings import Settings
from tests.fakes import FakeClock


@pytest.fixture
async def host(path: Path) -> AsyncIterator[Host]:
    settings = Settings(checkpoint=path, device="cpu", threads=1, replicas=1)
    host = Host(settings, Lifecycle(), Metrics(FakeClock()))
    await host.load()
    yield host
    await host.stop()


async def test_nobody_waits_for_a_writer_of_a_pipe(host: Host, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    reloading = asyncio.create_task(host.reload())
    done, _ = await asyncio.wait([reloading], timeout=5)
    if not done:
        os.close(os.open(path, os.O_RDWR))  # lets whoever reads it go
    with pytest.raises(FailedPrecondition, match="no regular file"):
        await reloading
    assert done


@pytest.mark.parametrize("waits", ["load", "reload"])
def test_a_file_system_that_does_not_answer_keeps_no_process(tiny_checkpoint: Path, tmp_path: Path, waits: str) -> None:
    script = f"""
        import threading
        from service import cli, hosting

        read, times = hosting.read_models, []

        def read_models(settings):
            times.append(1)
            if len(times) == {1 if waits == "load" else 2}:
                print("reading", flush=True)
                threading.Event().wait()
            return read(settings)

        hosting.read_models = read_models
        hosting.has_digest = lambda path, digest: False
        raise SystemExit(cli.serve(["--checkpoint", "{tiny_checkpoint}", "--http_port", "0", "--grpc_port", "0"]))
    """
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=file, stderr=file)
    try:
        if waits == "reload":
            wait_for(process, log, "ready after")
            process.send_signal(signal.SIGHUP)
        wait_for(process, log, "reading")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], log: Path, words: str) -> None:
    give_up = time.monotonic() + 120
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.02)


async def test_a_reload_that_nobody_waits_for_says_once_why_there_is_none(
    host: Host, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hang_up = Reloader(host)
    path.write_bytes(b"weights")
    hang_up()
    while "checkpoint" not in caplog.text:
        await asyncio.sleep(0.01)
    await host.at_rest()
    await host.drain(0)
    hang_up()
    while "shutting down" not in caplog.text:
        await asyncio.sleep(0.01)
    bad, late = caplog.records
    assert (bad.levelname, late.levelname) == ("ERROR", "WARNING")
    assert "stays: the checkpoint cannot be served: " in bad.message
    assert late.message == "no reload: the server is shutting down and takes no new work"


@pytest.mark.parametrize("factor", [1e20, 1e12])
async def test_finite_weights_that_give_no_numbers_are_not_served(host: Host, path: Path, factor: float) -> None:
    held = checkpoint.read(path)
    checkpoint.save(path, replace(held, model_state_dict={k: v * factor for k, v in held.model_state_dict.items()}))
    with pytest.raises(FailedPrecondition, match=f"{path}: .* of a text are not finite numbers"):
        await host.reload()


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "ALQC"}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("model", {"unk_token": "<unk>"}),
    ],
)
async def test_a_tokenizer_that_cannot_read_is_not_served(
    host: Host, path: Path, part: str, values: dict[str, object]
) -> None:
    """The first two panic in Rust, which is no `Exception`."""
    held = checkpoint.read(path)
    fields = json.loads(held.tokenizer)
    fields[part] |= values
    checkpoint.save(path, replace(held, tokenizer=json.dumps(fields)))
    with pytest.raises(FailedPrecondition, match=f"{path}: tokenizer: "):
        await host.reload()
