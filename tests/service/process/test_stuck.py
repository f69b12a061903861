"""A tick that never comes back: callers are told, and the process ends although its thread cannot."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rdt_core import checkpoint
from service.engine.engine import BatchingEngine
from service.engine.replica import Replica, Stuck
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Outcome, Plan
from service.errors import Internal, Unavailable
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.settings import Settings
from tests.fakes import FakeClock
from tests.service.engine.scripted import HeldBackend, ScriptedBackend, scripted_job, until_ready

LIMITS = SchedulerLimits(token_budget=20, max_live=2, max_waiting=3, max_waiting_tokens=40)


class Slow(ScriptedBackend):
    def run(self, plan: Plan) -> Outcome:
        time.sleep(0.1)
        return super().run(plan)


async def submit(engine: BatchingEngine, n_tokens: int = 20) -> int:
    with engine.reserve() as place:
        return (await engine.submit(scripted_job(n_tokens, depth=1), place)).steps


async def test_everybody_is_told_and_the_engine_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    held = HeldBackend()
    engine = BatchingEngine([held, ScriptedBackend()], LIMITS, stuck_seconds=0.05)
    await engine.start()
    callers = [asyncio.create_task(submit(engine)) for _ in range(2)]
    answers = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), timeout=5)
    assert [type(answer) for answer in answers] == [Unavailable, int], "one of two replicas is stuck"
    assert engine.failed.is_set()
    assert not engine.ready
    assert "a tick has not come back for 0.05 s" in caplog.text
    began = time.monotonic()
    await engine.drain(grace_seconds=30)
    await engine.stop()
    assert time.monotonic() - began < 2, "neither waits for what does not come"
    held.let_go()


async def test_all_polls_together_take_stuck_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def wait(futures: set[asyncio.Future[Any]], timeout: float) -> tuple[set[Any], set[asyncio.Future[Any]]]:
        waited.append(timeout)
        return set(), futures

    held = HeldBackend()
    replica = Replica(held, Scheduler(LIMITS), stuck_seconds=8.0)
    monkeypatch.setattr(asyncio, "wait", wait)
    with pytest.raises(Stuck, match="has not come back for 8 s"):
        await replica.run(Plan())
    await replica.stop()
    assert sum(waited) == 8.0, "and stopping waits no more"
    held.let_go()


async def test_an_end_that_is_asked_for_meanwhile_does_not_wait_for_ever() -> None:
    held = HeldBackend()
    engine = BatchingEngine([held], LIMITS, stuck_seconds=0.3)
    await engine.start()
    caller = asyncio.create_task(submit(engine))
    await asyncio.to_thread(held.wait_until_started)
    began = time.monotonic()
    await engine.stop()
    assert time.monotonic() - began < 2
    with pytest.raises(Unavailable):
        await caller
    held.let_go()


async def test_a_process_that_was_stopped_for_a_while_goes_on() -> None:
    """After `docker pause`, say: all timers are due at once, and the tick has hardly begun."""
    engine = BatchingEngine([Slow()], LIMITS, stuck_seconds=0.4)
    await engine.start()
    caller = asyncio.create_task(submit(engine))
    await asyncio.sleep(0.02)
    loop = asyncio.get_running_loop()
    with mock.patch.object(loop, "time", wraps=loop.time) as clock:
        clock.return_value = loop.time() + 100.0
        assert await caller == 1
    assert engine.ready
    await engine.stop()


async def test_a_backend_that_does_not_start_again_is_stuck_too() -> None:
    class NeverResets(ScriptedBackend):
        def reset(self) -> None:
            time.sleep(0.3)

    backend = NeverResets()
    backend.errors.append(RuntimeError("broken"))
    engine = BatchingEngine([backend], LIMITS, stuck_seconds=0.05)
    await engine.start()
    with pytest.raises(Internal):
        await submit(engine)
    await asyncio.wait_for(engine.failed.wait(), timeout=5)
    await engine.stop()


async def test_a_timeout_of_the_backends_own_is_a_broken_tick() -> None:
    backend = ScriptedBackend()
    backend.errors.append(TimeoutError("a card did not answer"))  # type: ignore[arg-type]
    engine = BatchingEngine([backend], LIMITS, stuck_seconds=30)
    await engine.start()
    with pytest.raises(Internal):
        await submit(engine)
    await until_ready(engine)
    await engine.stop()


async def test_stuck_seconds_count_a_tick_not_a_request() -> None:
    engine = BatchingEngine([Slow()], LIMITS, stuck_seconds=0.4)
    await engine.start()
    with engine.reserve() as place:
        result = await engine.submit(scripted_job(1, depth=7), place)
    assert result.steps == 7
    await engine.stop()


def test_the_process_ends_with_its_status() -> None:
    script = """
        import time
        from service.process import loop
        from service.engine.engine import BatchingEngine
        from service.engine.scheduler import SchedulerLimits
        from service.engine.types import Job

        class Never:
            ticks_late = 0

            def run(self, plan):
                time.sleep(60)

        async def main():
            engine = BatchingEngine([Never()], SchedulerLimits(20, 2, 3, 20), stuck_seconds=0.05)
            await engine.start()
            try:
                with engine.reserve() as place:
                    await engine.submit(Job([2], [True], 1, 0.0, "gate"), place)
            finally:
                await engine.stop()
                return 3

        raise SystemExit(loop.run(main()))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=30, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3, ended.stderr
    assert "a tick has not come back" in ended.stderr


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
