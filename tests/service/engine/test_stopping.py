"""How an engine ends: after the pass under way, in silence, and without leaving anything behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from service.engine.engine import BatchingEngine
from service.engine.replica import THREAD_NAME
from service.engine.scheduler import SchedulerLimits
from service.errors import Unavailable
from tests.service.engine.scripted import HeldBackend, ScriptedBackend, scripted_job, submit

LIMITS = SchedulerLimits(token_budget=20, max_live=2, max_waiting=3, max_waiting_tokens=20)


async def test_retiring_waits_for_what_was_accepted() -> None:
    held = HeldBackend()
    engine = BatchingEngine([held], LIMITS)
    await engine.start()
    accepted = asyncio.create_task(submit(engine, scripted_job(4, depth=2)))
    await asyncio.sleep(0)
    retiring = asyncio.create_task(engine.retire())
    held.let_go(1)
    await asyncio.to_thread(held.wait_until_started)
    assert not retiring.done()
    held.let_go(1)
    assert (await accepted).steps == 2
    await asyncio.wait_for(retiring, timeout=5)
    assert not engine.ready


@pytest.mark.parametrize("thread_ends", ["later", "at once"])
async def test_a_stopped_engine_is_let_go_of_at_once(thread_ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its model: neither its loops hold it, nor a deadline that is an hour away."""
    if thread_ends == "at once":

        async def in_no_turn(call: Callable[..., None], *args: object, **named: object) -> None:
            call(*args, **named)

        monkeypatch.setattr(asyncio, "to_thread", in_no_turn)
    engine = BatchingEngine([ScriptedBackend()], LIMITS)
    await engine.start()
    await submit(engine, scripted_job(1, depth=1, deadline=time.monotonic() + 3600))
    await engine.stop()
    stopped = weakref.ref(engine)
    del engine
    assert stopped() is None


async def test_stopping_ends_the_worker_thread(caplog: pytest.LogCaptureFixture) -> None:
    before = {*threading.enumerate()}  # another test may have left one that is ending
    engine = BatchingEngine([ScriptedBackend()], LIMITS)
    await engine.start()
    await submit(engine, scripted_job(1, depth=1))
    own = [thread for thread in {*threading.enumerate()} - before if thread.name.startswith(THREAD_NAME)]
    assert len(own) == 1
    await engine.stop()
    assert not own[0].is_alive()
    assert caplog.text == "", "nothing went wrong"


async def test_stopping_waits_for_the_pass_under_way_and_says_nothing_of_how_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = HeldBackend()
    held.errors.append(RuntimeError("nobody waits for this any more"))
    engine = BatchingEngine([held], LIMITS)
    await engine.start()
    live = asyncio.create_task(submit(engine, scripted_job(4, depth=2)))
    await asyncio.to_thread(held.wait_until_started)
    stopping = asyncio.create_task(engine.stop())
    with pytest.raises(Unavailable):
        await live
    await asyncio.sleep(0.02)
    assert not stopping.done(), "the thread is still computing"
    held.let_go()
    await asyncio.wait_for(stopping, timeout=5)
    assert len(held.ticks) == 1
    del engine, live, stopping
    gc.collect()
    assert caplog.text == ""
