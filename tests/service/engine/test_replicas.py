"""Several batches side by side, fed from one line."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from rdt_core import RDT
from service.engine.backend import OutOfMemory
from service.engine.eager import EagerBackend
from service.engine.engine import BatchingEngine
from service.engine.scheduler import JobQueue, Scheduler, SchedulerLimits
from service.engine.types import Job, Outcome, Plan, Result
from service.errors import Internal, ResourceExhausted
from tests.service.engine.scripted import HeldBackend, ScriptedBackend, put, scripted_job, submit, until_ready
from tests.service.engine.test_eager import check_against_the_reference, random_job

LIMITS = SchedulerLimits(token_budget=40, max_live=4, max_waiting=60, max_waiting_tokens=1000)


@pytest.fixture
def held() -> list[HeldBackend]:
    return [HeldBackend(), HeldBackend()]


@pytest.fixture
async def engine(held: list[HeldBackend]) -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine(held, LIMITS)
    await engine.start()
    yield engine
    for backend in held:
        backend.let_go(100)
    await engine.stop()


async def start(engine: BatchingEngine, held: list[HeldBackend], *jobs: Job) -> list[asyncio.Task[Result]]:
    """All submitted at once, and the first tick of every replica under way."""
    tasks = [asyncio.create_task(submit(engine, job)) for job in jobs]
    for backend in held:
        await asyncio.to_thread(backend.wait_until_started)
    return tasks


async def test_requests_are_spread_before_they_are_batched(engine: BatchingEngine, held: list[HeldBackend]) -> None:
    tasks = await start(engine, held, *(scripted_job(4, depth=1) for _ in range(4)))
    assert (engine.live, engine.waiting) == (4, 0)
    for backend in held:
        backend.let_go()
    assert [result.steps for result in await asyncio.gather(*tasks)] == [1] * 4
    assert [len(backend.ticks[0].live) for backend in held] == [2, 2]


async def test_a_replica_with_all_the_sequences_it_may_have_is_no_reason_to_wait(
    engine: BatchingEngine, held: list[HeldBackend]
) -> None:
    """An even share of tokens would be less than the other has, but this one can take no more."""
    tasks = await start(engine, held, scripted_job(26, depth=9), *(scripted_job(1, depth=9) for _ in range(4)))
    assert engine.live == 5
    newcomer = asyncio.create_task(submit(engine, scripted_job(1, depth=1)))
    held[0].let_go(2)
    assert (await asyncio.wait_for(newcomer, 3)).steps == 1
    assert held[1].ticks == [], "the other stands still in its first"
    for task in tasks:
        task.cancel()


async def test_who_leaves_is_dropped_wherever_it_is_live(engine: BatchingEngine, held: list[HeldBackend]) -> None:
    tasks = await start(engine, held, scripted_job(4, depth=50), scripted_job(4, depth=50))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for backend in held:
        backend.let_go(2)
    async with asyncio.timeout(5):
        while [len(backend.ticks) for backend in held] != [2, 2]:  # the second drops them, and is made for nothing else
            await asyncio.sleep(0.001)
    assert engine.live == 0


async def test_a_broken_replica_fails_its_own_jobs(engine: BatchingEngine, held: list[HeldBackend]) -> None:
    tasks = await start(engine, held, scripted_job(4, depth=1), scripted_job(4, depth=1))
    held[0].errors.append(RuntimeError("a broken kernel"))
    for backend in held:
        backend.let_go()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["Internal", "Result"]
    await until_ready(engine)
    assert [backend.resets for backend in held] == [1, 0]


async def test_draining_waits_for_every_replica(engine: BatchingEngine, held: list[HeldBackend]) -> None:
    tasks = await start(engine, held, scripted_job(4, depth=1), scripted_job(4, depth=3))
    draining = asyncio.create_task(engine.drain(grace_seconds=10))
    held[0].let_go(3)
    await asyncio.sleep(0.05)
    assert not draining.done()
    held[1].let_go(3)
    await asyncio.wait_for(draining, timeout=5)
    assert all(task.done() for task in tasks)


async def test_every_job_ends_once() -> None:
    engine = BatchingEngine([ScriptedBackend() for _ in range(3)], replace(LIMITS, max_waiting=30))
    await engine.start()

    async def one(number: int) -> str:
        try:
            return f"{(await submit(engine, scripted_job(1 + number % 4, depth=1 + number % 3))).steps} passes"
        except ResourceExhausted:
            return "refused"

    ends = await asyncio.gather(*(one(number) for number in range(80)))
    assert ends[:30] == [f"{1 + number % 3} passes" for number in range(30)]
    assert set(ends[30:]) <= {"refused", "1 passes", "2 passes", "3 passes"}
    assert (engine.live, engine.waiting) == (0, 0)
    await engine.stop()


async def test_company_and_replica_do_not_change_an_answer(tiny_model: RDT) -> None:
    rng = random.Random(5)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(40)]
    engine = BatchingEngine([EagerBackend(tiny_model) for _ in range(2)], LIMITS)
    await engine.start()
    results = await asyncio.gather(*(submit(engine, job) for job in jobs))
    await engine.stop()
    check_against_the_reference(tiny_model, jobs, results)


def test_a_scheduler_takes_its_share_and_leaves_the_rest_in_the_queue() -> None:
    queue = JobQueue(LIMITS)
    first, second = (Scheduler(LIMITS, queue) for _ in range(2))
    for _ in range(3):
        put(queue, scripted_job(4, depth=1))
    assert first.plan(now=0.0, share=6.0).live == (1, 2)  # the job that reaches the share is still taken
    assert second.plan(now=0.0, share=6.0).live == (3,)
    assert len(queue) == 0


async def test_what_gave_up_stays_so_when_another_replica_comes_back() -> None:
    class SlowReset(ScriptedBackend):
        def reset(self) -> None:
            down.set()
            assert back.wait(5)

    class BreaksSecond(ScriptedBackend):
        def run(self, plan: Plan) -> Outcome:
            assert down.wait(5)
            return super().run(plan)

    down, back = threading.Event(), threading.Event()
    slow, other = SlowReset(), BreaksSecond()
    for backend in (slow, other):
        backend.errors.append(RuntimeError("broken"))
    engine = BatchingEngine([slow, other], LIMITS)
    await engine.start()
    ends = await asyncio.gather(*(submit(engine, scripted_job(4, 1)) for _ in range(2)), return_exceptions=True)
    assert all(isinstance(end, Internal) for end in ends)
    await asyncio.wait_for(engine.failed.wait(), timeout=5)
    back.set()
    await asyncio.sleep(0.05)
    assert not engine.ready
    await engine.stop()


async def test_a_replica_short_of_memory_keeps_no_work_from_the_others() -> None:
    held = HeldBackend()
    engine = BatchingEngine([held, ScriptedBackend()], LIMITS)
    engine._replicas[1].scheduler.budget.tokens = 4
    await engine.start()
    first = asyncio.create_task(submit(engine, scripted_job(20, depth=2)))
    await asyncio.to_thread(held.wait_until_started)
    second = asyncio.create_task(submit(engine, scripted_job(10, depth=1)))
    await asyncio.sleep(0)
    held.let_go(2)
    await asyncio.gather(first, second)
    assert [len(plan.live) for plan in held.ticks] == [1, 2], "the second has room beside the first, and no other place"
    await engine.stop()


async def test_draining_waits_for_what_one_replica_alone_has_memory_for() -> None:
    engine = BatchingEngine([ScriptedBackend(), ScriptedBackend()], LIMITS)
    engine._replicas[0].scheduler.budget.tokens = 4
    await engine.start()
    large = asyncio.create_task(submit(engine, scripted_job(20, depth=5)))
    async with asyncio.timeout(5):
        while not engine.live:
            await asyncio.sleep(0)
        await engine.drain(grace_seconds=10)
    assert engine.live == 0
    assert (await large).steps == 5
    await engine.stop()


async def test_an_idle_replica_takes_what_another_has_no_memory_for() -> None:
    short = ScriptedBackend()
    short.errors.append(OutOfMemory("none left"))
    engine = BatchingEngine([short, ScriptedBackend()], LIMITS)
    await engine.start()
    async with asyncio.timeout(5):
        assert (await submit(engine, scripted_job(20, depth=2))).steps == 2
    assert len(short.ticks) == 1
    await engine.stop()
