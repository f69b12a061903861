"""Who gets the interpreter and how many threads compute, and how a host learns that its engine has failed."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdt_core import checkpoint
from service.hosting import SWITCH_SECONDS, Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.settings import Settings
from tests.fakes import FakeClock


@pytest.fixture
def _as_python_starts() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_as_python_starts")
async def test_a_server_that_computes_switches_threads_sooner(tiny_checkpoint: Path) -> None:
    host = Host(Settings(checkpoint=tiny_checkpoint, threads=1, replicas=1), Lifecycle(), Metrics(FakeClock()))
    await host.load()
    await host.stop()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)


async def test_operations_get_the_threads_of_the_settings(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    host = Host(Settings(checkpoint=tiny_checkpoint, threads=3, replicas=1), Lifecycle(), Metrics(FakeClock()))
    await host.load()
    await host.stop()
    assert told[0] == 3


async def test_a_host_fails_with_the_engine_that_serves_and_no_other(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_checkpoint, tmp_path))
    host = Host(Settings(checkpoint=path, threads=1, replicas=1), Lifecycle(), Metrics(FakeClock()))
    await host.load()
    replaced = host._engine
    saved = checkpoint.read(path)
    checkpoint.save(path, replace(saved, config=saved.config | {"name": "another"}))
    assert (await host.reload()).outcome == "swapped"
    serving = host._engine
    assert replaced is not None
    assert serving is not None
    replaced.failed.set()
    await asyncio.sleep(0.05)
    assert not host.failed.is_set()
    serving.failed.set()
    await asyncio.wait_for(host.failed.wait(), 5)
    await host.stop()
