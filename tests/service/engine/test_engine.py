"""What the engine promises: order, bounds, leaving, deadlines, draining, failing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest.mock import ANY, Mock

import pytest

from service.engine.engine import BatchingEngine
from service.engine.protocol import Watcher
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job, Outcome, Plan, Reading, Result
from service.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from tests.fakes import FakeClock
from tests.service.engine.scripted import HeldBackend, ScriptedBackend, scripted_job, submit, until_ready

LIMITS = SchedulerLimits(token_budget=20, max_live=2, max_waiting=3, max_waiting_tokens=20)


async def submitted(engine: BatchingEngine, job: Job) -> asyncio.Task[Result]:
    """A submission under way: it has reached the line."""
    task = asyncio.create_task(submit(engine, job))
    await asyncio.sleep(0)
    return task


@pytest.fixture
def held() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
async def engine(held: HeldBackend) -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine([held], LIMITS)
    await engine.start()
    yield engine
    held.let_go(100)
    await engine.stop()


@pytest.fixture
async def busy(engine: BatchingEngine, held: HeldBackend) -> AsyncIterator[asyncio.Task[Result]]:
    """One job of the full budget, its first tick under way: whatever comes now waits."""
    task = await submitted(engine, scripted_job(20, depth=1))
    await asyncio.to_thread(held.wait_until_started)
    yield task
    task.cancel()


async def test_a_shallow_job_does_not_wait_for_a_deep_one(engine: BatchingEngine, held: HeldBackend) -> None:
    deep = await submitted(engine, scripted_job(4, depth=9))
    shallow = await submitted(engine, scripted_job(4, depth=1))
    held.let_go(2)
    assert (await shallow).steps == 1
    assert not deep.done()
    held.let_go(8)
    assert (await deep).steps == 9


async def test_live_and_waiting_are_told_apart(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]
) -> None:
    waiting = await submitted(engine, scripted_job(4, depth=1))
    assert (engine.live, engine.waiting) == (1, 1)
    held.let_go(2)
    await asyncio.gather(busy, waiting)
    assert (engine.live, engine.waiting) == (0, 0)


@pytest.mark.usefixtures("busy")
async def test_the_queue_refuses_at_once_by_requests(engine: BatchingEngine) -> None:
    for _ in range(3):
        await submitted(engine, scripted_job(1, depth=1))
    with pytest.raises(ResourceExhausted) as refused:
        engine.reserve().__enter__()
    assert refused.value.reason == "queue_requests"


@pytest.mark.usefixtures("busy")
async def test_the_queue_refuses_at_once_by_tokens(engine: BatchingEngine) -> None:
    await submitted(engine, scripted_job(15, depth=1))
    with pytest.raises(ResourceExhausted) as refused:
        await submit(engine, scripted_job(6, depth=1))
    assert refused.value.reason == "queue_tokens"


async def test_a_reserved_place_counts_until_it_is_given_up(engine: BatchingEngine) -> None:
    with engine.reserve(), engine.reserve(), engine.reserve():
        assert engine.waiting == 3
        with pytest.raises(ResourceExhausted):
            engine.reserve().__enter__()
    assert engine.waiting == 0


async def test_a_caller_who_leaves_the_line_is_out_at_once(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]
) -> None:
    gone = await submitted(engine, scripted_job(4, depth=1))
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    assert engine.waiting == 0
    held.let_go(2)
    await busy
    assert len(held.ticks) == 1


async def test_a_caller_who_leaves_frees_the_tokens_within_a_tick(engine: BatchingEngine, held: HeldBackend) -> None:
    gone = await submitted(engine, scripted_job(20, depth=50))
    await asyncio.to_thread(held.wait_until_started)
    gone.cancel()
    follower = await submitted(engine, scripted_job(20, depth=1))
    held.let_go(2)
    assert (await follower).steps == 1
    assert len(held.ticks) == 2, "one with the job that was left, one with its follower"


async def test_who_leaves_as_the_answer_comes_breaks_no_tick(engine: BatchingEngine, held: HeldBackend) -> None:
    leaving = asyncio.create_task(submit(engine, scripted_job(4, depth=1)))
    staying = submit(engine, scripted_job(4, depth=1), lambda _: leaving.cancel())
    held.let_go()
    assert (await asyncio.wait_for(staying, timeout=5)).steps == 1
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    assert (len(held.ticks), held.resets) == (1, 0)


async def test_who_leaves_during_the_last_pass_breaks_no_tick(engine: BatchingEngine, held: HeldBackend) -> None:
    leaving = await submitted(engine, scripted_job(4, depth=1))
    await asyncio.to_thread(held.wait_until_started)
    leaving.cancel()
    await asyncio.wait([leaving])
    held.let_go(2)
    assert (await submit(engine, scripted_job(4, depth=1))).steps == 1
    assert held.resets == 0


async def test_a_deadline_in_the_line_is_answered_on_time(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]
) -> None:
    late = await submitted(engine, scripted_job(4, depth=1, deadline=time.monotonic() + 0.01))
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(late, timeout=2)
    assert engine.waiting == 0
    held.let_go()
    await busy


async def test_a_deadline_to_come_leaves_its_job_in_the_line(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]
) -> None:
    waiting = await submitted(engine, scripted_job(4, depth=1, deadline=time.monotonic() + 60))
    await asyncio.sleep(0.02)
    held.let_go(2)
    await busy
    assert (await waiting).reason == "gate"


async def test_a_deadline_already_over_never_runs(engine: BatchingEngine, held: HeldBackend) -> None:
    with pytest.raises(DeadlineExceeded):
        await submit(engine, scripted_job(4, depth=1, deadline=time.monotonic() - 1))
    assert held.ticks == []


async def test_a_deadline_while_live_gives_what_is_there(held: HeldBackend) -> None:
    clock = FakeClock()
    engine = BatchingEngine([held], LIMITS, clock)
    await engine.start()
    task = await submitted(engine, scripted_job(4, depth=50, deadline=clock.now + 60))
    await asyncio.to_thread(held.wait_until_started)
    clock.now += 60
    held.let_go(2)
    result = await task
    assert (result.reason, result.tokens) == ("deadline", [7] * 4)
    await engine.stop()


@pytest.mark.parametrize(("late", "answered"), [(0, 5.0), (2, 3.0)], ids=["in its tick", "two ticks late"])
async def test_the_answer_is_there_before_the_deadline_when_ticks_are_long(late: int, answered: float) -> None:
    clock = FakeClock()

    class SlowBackend(ScriptedBackend):
        ticks_late = late  # though it tells at once

        def run(self, plan: Plan) -> Outcome:
            clock.now += 1.0
            return super().run(plan)

    engine = BatchingEngine([SlowBackend()], LIMITS, clock)
    await engine.start()
    began = clock.now
    result = await submit(engine, scripted_job(4, depth=50, deadline=began + 5.5))
    assert (result.reason, clock.now - began) == ("deadline", answered)
    await engine.stop()


async def test_every_pass_is_shown_to_a_caller_who_asks(engine: BatchingEngine, held: HeldBackend) -> None:
    seen: list[Reading] = []
    held.let_go(3)
    result = await submit(engine, scripted_job(2, depth=3, stream=True), seen.append)
    assert [reading.level for reading in seen] == result.levels
    assert [len(reading.guesses) for reading in seen] == [2, 2, 0]


async def test_times_are_told_truthfully(engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]) -> None:
    began = time.monotonic()
    waiting = await submitted(engine, scripted_job(4, depth=2))
    await asyncio.sleep(0.05)
    held.let_go()
    await busy
    await asyncio.sleep(0.02)
    held.let_go(2)
    result = await waiting
    assert result.queue_seconds >= 0.05
    assert result.compute_seconds >= 0.02
    assert result.queue_seconds + result.compute_seconds <= time.monotonic() - began


async def test_a_broken_tick_fails_its_jobs_and_no_others(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result], caplog: pytest.LogCaptureFixture
) -> None:
    waiting = await submitted(engine, scripted_job(4, depth=1))
    held.errors.append(RuntimeError("a broken kernel"))
    held.let_go(2)
    with pytest.raises(Internal) as failure:
        await busy
    assert "kernel" not in failure.value.message
    assert "a broken kernel" in caplog.text
    assert (await waiting).steps == 1
    assert held.resets == 1
    assert engine.ready
    assert not engine.failed.is_set()


async def test_a_watcher_hears_how_long_a_tick_took_and_of_one_that_broke() -> None:
    clock, watcher = FakeClock(), Mock(spec=Watcher)

    class SlowBackend(ScriptedBackend):
        def run(self, plan: Plan) -> Outcome:
            clock.now += 1.5
            return super().run(plan)

    backend = SlowBackend()
    engine = BatchingEngine([backend], LIMITS, clock, watcher)
    await engine.start()
    await submit(engine, scripted_job(1, depth=1))
    watcher.ticked.assert_called_once_with(1.5, ANY, ANY)
    watcher.tick_broke.assert_not_called()
    backend.errors.append(RuntimeError("broken"))
    with pytest.raises(Internal):
        await submit(engine, scripted_job(1, depth=1))
    watcher.tick_broke.assert_called_once_with()
    assert watcher.ticked.call_count == 1
    await engine.stop()


async def test_a_tick_that_only_drops_is_not_counted(engine: BatchingEngine, held: HeldBackend) -> None:
    engine._watcher = watcher = Mock(spec=Watcher)
    left = await submitted(engine, scripted_job(1, depth=50))
    await asyncio.to_thread(held.wait_until_started)
    left.cancel()
    held.let_go(2)
    await engine.drain(grace_seconds=5)
    assert ([len(plan.live) for plan in held.ticks], watcher.ticked.call_count) == ([1, 0], 1)


async def test_an_observer_that_fails_fails_alone(engine: BatchingEngine, held: HeldBackend) -> None:
    def fails(reading: Reading) -> None:
        raise KeyError(reading)

    other = await submitted(engine, scripted_job(4, depth=3))
    observing = asyncio.create_task(submit(engine, scripted_job(4, depth=3), fails))
    held.let_go(5)
    with pytest.raises(Internal, match="logged"):
        await observing
    assert (await other).steps == 3
    assert engine.ready
    assert (held.resets, engine.live) == (0, 0)


async def test_nobody_hangs_when_the_loop_itself_breaks(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await submitted(engine, scripted_job(20, depth=1))
    monkeypatch.setattr(engine._replicas[0].scheduler, "plan", lambda *_: 1 / 0)
    held.let_go()
    await busy
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, timeout=5)
    assert engine.failed.is_set()
    assert not engine.ready


async def test_the_engine_is_not_ready_while_its_backend_restarts() -> None:
    restarting = threading.Event()

    class SlowReset(ScriptedBackend):
        def reset(self) -> None:
            assert restarting.wait(5)

    backend = SlowReset()
    backend.errors.append(RuntimeError("broken"))
    engine = BatchingEngine([backend], LIMITS)
    await engine.start()
    with pytest.raises(Internal):
        await submit(engine, scripted_job(1, depth=1))
    assert not engine.ready
    with pytest.raises(Unavailable):
        engine.reserve()
    restarting.set()
    await until_ready(engine)
    await engine.stop()


@pytest.mark.parametrize(("seconds_between", "gives_up"), [(59.0, True), (61.0, False)])
async def test_two_broken_ticks_within_a_minute_end_the_engine(seconds_between: float, gives_up: bool) -> None:
    clock, backend = FakeClock(), ScriptedBackend()
    backend.errors += [RuntimeError("one"), RuntimeError("two")]
    engine = BatchingEngine([backend], LIMITS, clock)
    await engine.start()
    for _ in range(2):
        await until_ready(engine)
        with pytest.raises(Internal):
            await submit(engine, scripted_job(1, depth=1))
        clock.now += seconds_between
    await (asyncio.wait_for(engine.failed.wait(), timeout=5) if gives_up else until_ready(engine))
    assert engine.failed.is_set() == gives_up
    assert engine.ready != gives_up
    await engine.stop()


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(
    engine: BatchingEngine, held: HeldBackend, busy: asyncio.Task[Result]
) -> None:
    waiting = await submitted(engine, scripted_job(4, depth=1))
    draining = asyncio.create_task(engine.drain(grace_seconds=5))
    await asyncio.sleep(0)
    assert not engine.ready
    with pytest.raises(Unavailable):
        engine.reserve()
    assert not draining.done()
    held.let_go(2)
    await draining
    assert ((await busy).steps, (await waiting).steps) == (1, 1)


async def test_draining_fails_what_the_grace_period_does_not_cover(engine: BatchingEngine, held: HeldBackend) -> None:
    tasks = [await submitted(engine, scripted_job(20, depth=50)) for _ in range(2)]
    await asyncio.to_thread(held.wait_until_started)
    await engine.drain(grace_seconds=0.01)
    await asyncio.wait(tasks, timeout=5)
    assert all(isinstance(task.exception(), Unavailable) for task in tasks)
    held.let_go(2)
    await asyncio.wait_for(engine.stop(), timeout=2)


@pytest.mark.usefixtures("busy")
async def test_a_place_from_before_draining_is_no_way_in(engine: BatchingEngine) -> None:
    with engine.reserve() as place:
        draining = asyncio.create_task(engine.drain(grace_seconds=60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(engine.submit(scripted_job(1, depth=1), place), timeout=2)
    draining.cancel()


async def test_draining_an_idle_engine_is_instant(engine: BatchingEngine) -> None:
    await asyncio.wait_for(engine.drain(grace_seconds=60), timeout=1)


async def test_every_job_ends_once_under_a_mix_of_everything() -> None:
    engine = BatchingEngine([ScriptedBackend()], replace(LIMITS, max_waiting=20, max_waiting_tokens=60))
    await engine.start()

    async def one(number: int) -> str:
        deadline = time.monotonic() - 1 if number % 5 == 0 else None
        task = await submitted(engine, scripted_job(1 + number % 4, depth=1 + number % 3, deadline=deadline))
        if number % 7 == 0:
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        except (ResourceExhausted, DeadlineExceeded) as error:
            return error.code
        return "answered"

    ends = await asyncio.gather(*map(one, range(60)))
    assert set(ends) == {"answered", "cancelled", "resource_exhausted", "deadline_exceeded"}
    assert (engine.live, engine.waiting) == (0, 0)
    await engine.stop()
