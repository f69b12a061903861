"""Who gets the interpreter, when computing threads and the event loop both want it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
