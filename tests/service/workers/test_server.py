"""The engine's end by itself: connections that say nothing, and what is said once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.engine.scheduler import SchedulerLimits
from service.metrics import Metrics
from service.settings import Settings
from service.workers import metering, server
from service.workers.messages import Message, Status
from service.workers.metering import Ledger
from service.workers.server import EngineServer
from service.workers.wire import Wire
from tests.fakes import FakeClock
from tests.service.engine.scripted import ScriptedBackend
from tests.service.workers.fleet import Fleet, OneEngine, running, until

LIMITS = SchedulerLimits(token_budget=32, max_live=1, max_waiting=3, max_waiting_tokens=100)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    host = OneEngine([ScriptedBackend()], LIMITS)
    async with running(Fleet(tmp_path / "engine", host, Settings())) as fleet:
        yield fleet


async def test_an_engine_without_workers_waits_for_none() -> None:
    await asyncio.wait_for(EngineServer(Ledger(Metrics(FakeClock()))).left(60), 5)


async def test_a_server_that_stops_hangs_up_and_says_no_more(fleet: Fleet) -> None:
    ends: list[Wire] = []
    await asyncio.get_running_loop().create_unix_connection(lambda: Wire(lambda *_: None, ends.append), str(fleet.path))
    await until(lambda: fleet.server._peers)
    await fleet.server.stop()
    assert all(task.cancelled() for task in fleet.server._tasks)
    await until(lambda: ends)


async def test_who_has_not_said_hello_is_no_worker(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scrape waits for it, and it cannot be lost."""
    monkeypatch.setattr(metering, "ANSWER_SECONDS", 60.0)
    silent = Wire(lambda *_: None, lambda _: None)
    await asyncio.get_running_loop().create_unix_connection(lambda: silent, str(fleet.path))
    await until(lambda: fleet.server._peers)
    heard: list[Message] = []
    asking = Wire(lambda _, message: heard.append(message), lambda _: None)
    await asyncio.get_running_loop().create_unix_connection(lambda: asking, str(fleet.path))
    asking.send(metering.Scrape(1))
    await until(lambda: any(isinstance(message, metering.Scraped) for message in heard))
    silent.abort()
    await until(lambda: len(fleet.server._peers) == 1)
    assert fleet.host.metrics.registry.get_sample_value("rdt_workers_lost_total") == 0


async def test_the_state_of_the_queue_is_told_when_it_has_changed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STATUS_SECONDS", 0.0)
    told: list[Message] = []
    monkeypatch.setattr(fleet.server, "_tell_all", told.append)
    fleet.server._told = None
    await until(lambda: told)
    for waiting in (0, 0, 1):
        monkeypatch.setattr(OneEngine, "waiting", waiting)
        for _ in range(3):
            await asyncio.sleep(0)
    assert [message.waiting for message in told if isinstance(message, Status)] == [0, 1]
