"""Who gets the interpreter when computing threads and the event loop both want it, and how many threads compute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
