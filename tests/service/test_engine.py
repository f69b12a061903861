"""What every engine promises, on the sequential one: order, bounds, leaving, deadlines, draining, failing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest
import torch

from rdt_core import RDT, restore
from service.engine.engine import SequentialEngine
from service.engine.reference import run_reference
from service.engine.types import Job, Result
from service.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from tests.fakes import HeldComputation

MAX_WAITING = 3
MAX_WAITING_TOKENS = 20


def job(first_token: int = 1, length: int = 3, max_steps: int = 1, deadline: float | None = None) -> Job:
    return Job([first_token] * length, [True] * length, max_steps, 0.0, "gate", deadline=deadline)


async def submit(engine: SequentialEngine, work: Job) -> Result:
    with engine.reserve() as place:
        return await engine.submit(work, place)


async def submitted(engine: SequentialEngine, work: Job) -> asyncio.Task[Result]:
    """A submission under way: it has reached the queue or the worker."""
    task = asyncio.create_task(submit(engine, work))
    await asyncio.sleep(0)
    return task


@pytest.fixture
def held() -> HeldComputation:
    return HeldComputation()


@pytest.fixture
async def engine(held: HeldComputation) -> AsyncIterator[SequentialEngine]:
    engine = SequentialEngine(held, MAX_WAITING, MAX_WAITING_TOKENS)
    await engine.start()
    yield engine
    held.let_go(100)
    await engine.stop()


async def test_first_come_first_served_one_at_a_time(engine: SequentialEngine, held: HeldComputation) -> None:
    tasks = [await submitted(engine, job(first_token=token)) for token in (5, 6, 7)]
    held.wait_until_started()
    assert (engine.live, engine.waiting) == (1, 2)
    held.let_go(3)
    results = await asyncio.gather(*tasks)
    assert [work.tokens[0] for work in held.ran] == [5, 6, 7]
    assert (engine.live, engine.waiting) == (0, 0)
    assert results[2].queue_seconds >= results[0].compute_seconds > 0


async def test_the_queue_is_bounded_in_requests(engine: SequentialEngine, held: HeldComputation) -> None:
    tasks = [await submitted(engine, job()) for _ in range(1 + MAX_WAITING)]
    with pytest.raises(ResourceExhausted) as refused:
        engine.reserve().__enter__()
    assert refused.value.reason == "queue_requests"
    held.let_go()
    await tasks[0]
    tasks.append(await submitted(engine, job()))  # there is room again
    held.let_go(MAX_WAITING + 1)
    await asyncio.gather(*tasks)


async def test_the_queue_is_bounded_in_tokens(engine: SequentialEngine, held: HeldComputation) -> None:
    tasks = [await submitted(engine, job()), await submitted(engine, job(length=15))]
    with pytest.raises(ResourceExhausted) as refused:
        await submit(engine, job(length=6))
    assert refused.value.reason == "queue_tokens"
    tasks.append(await submitted(engine, job(length=5)))  # these fit exactly
    with pytest.raises(ResourceExhausted) as refused:
        engine.reserve().__enter__()  # and nothing after them, whatever its size
    assert refused.value.reason == "queue_tokens"
    assert engine.waiting == 2
    held.let_go(3)
    await asyncio.gather(*tasks)


async def test_a_job_over_the_token_bound_can_wait_alone(engine: SequentialEngine, held: HeldComputation) -> None:
    tasks = [await submitted(engine, job()), await submitted(engine, job(length=MAX_WAITING_TOKENS + 1))]
    held.let_go(2)
    await asyncio.gather(*tasks)


async def test_a_reserved_place_counts_until_it_is_given_up(engine: SequentialEngine) -> None:
    with engine.reserve(), engine.reserve(), engine.reserve():
        assert engine.waiting == MAX_WAITING
        with pytest.raises(ResourceExhausted):
            engine.reserve().__enter__()
    assert engine.waiting == 0


async def test_a_caller_who_leaves_the_queue_is_out_at_once(engine: SequentialEngine, held: HeldComputation) -> None:
    first, second, third = [await submitted(engine, job(first_token=token)) for token in (5, 6, 7)]
    second.cancel()
    await asyncio.wait([second])
    assert second.cancelled()
    assert engine.waiting == 1
    held.let_go(2)
    await asyncio.gather(first, third)
    assert [work.tokens[0] for work in held.ran] == [5, 7]


async def test_a_caller_who_leaves_stops_the_computation_after_the_pass(
    engine: SequentialEngine, held: HeldComputation
) -> None:
    task = await submitted(engine, job(max_steps=50))
    held.wait_until_started()
    task.cancel()
    await asyncio.wait([task])
    assert engine.live == 1, "the pass under way ends first"
    follower = await submitted(engine, job())
    held.let_go(2)
    await follower
    assert held.passes == 2, "one of the job that was left, one of its follower"


async def test_a_deadline_in_the_queue(engine: SequentialEngine, held: HeldComputation) -> None:
    blocker = await submitted(engine, job())
    late = await submitted(engine, job(first_token=9, deadline=time.monotonic() + 0.01))
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(late, timeout=2)  # answered although the worker is still busy
    assert engine.waiting == 0
    held.let_go()
    await blocker
    assert [work.tokens[0] for work in held.ran] == [1]


async def test_a_deadline_already_over(engine: SequentialEngine, held: HeldComputation) -> None:
    with pytest.raises(DeadlineExceeded):
        await submit(engine, job(deadline=time.monotonic() - 1))
    assert held.ran == []
    assert engine.live == 0


async def test_a_deadline_during_the_computation_gives_what_is_there(
    engine: SequentialEngine, held: HeldComputation
) -> None:
    deadline = time.monotonic() + 0.05
    task = await submitted(engine, job(max_steps=50, deadline=deadline))
    held.wait_until_started()
    await asyncio.sleep(max(0.0, deadline - time.monotonic()) + 0.01)
    held.let_go()
    result = await task
    assert (result.reason, result.steps) == ("deadline", 1)


async def test_an_exception_fails_its_job_and_no_other(
    engine: SequentialEngine, held: HeldComputation, caplog: pytest.LogCaptureFixture
) -> None:
    held.error = RuntimeError("a broken kernel")
    task = await submitted(engine, job())
    held.let_go()
    with pytest.raises(Internal) as failure:
        await task
    assert "kernel" not in failure.value.message
    assert "a broken kernel" in caplog.text
    held.error = None
    held.let_go()
    assert (await submit(engine, job())).steps == 1
    assert engine.ready


async def test_an_exception_after_the_caller_left_is_harmless(
    engine: SequentialEngine, held: HeldComputation, caplog: pytest.LogCaptureFixture
) -> None:
    task = await submitted(engine, job())
    held.wait_until_started()
    task.cancel()
    await asyncio.wait([task])
    held.error = RuntimeError("late")
    held.let_go()
    await _idle(engine)
    assert "late" in caplog.text
    held.error = None
    held.let_go()
    await submit(engine, job())


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(
    engine: SequentialEngine, held: HeldComputation
) -> None:
    tasks = [await submitted(engine, job(first_token=token)) for token in (5, 6)]
    draining = asyncio.create_task(engine.drain(grace_seconds=5))
    await asyncio.sleep(0)
    assert not engine.ready
    with pytest.raises(Unavailable):
        engine.reserve()
    assert not draining.done()
    held.let_go(2)
    await draining
    assert [task.result().steps for task in await _all(tasks)] == [1, 1]


async def test_draining_fails_what_the_grace_period_does_not_cover(
    engine: SequentialEngine, held: HeldComputation
) -> None:
    tasks = [await submitted(engine, job(max_steps=50)) for _ in range(2)]
    held.wait_until_started()
    await engine.drain(grace_seconds=0.01)
    for task in await _all(tasks):
        assert isinstance(task.exception(), Unavailable)
    held.let_go()
    await asyncio.wait_for(engine.stop(), timeout=2)
    assert held.passes == 1, "the live job ended at its next pass, the waiting one never ran"


async def test_draining_an_idle_engine_is_instant(engine: SequentialEngine) -> None:
    await asyncio.wait_for(engine.drain(grace_seconds=60), timeout=1)


async def test_every_job_ends_once_under_a_mix_of_everything(held: HeldComputation) -> None:
    held.let_go(1000)
    engine = SequentialEngine(held, max_waiting=8, max_waiting_tokens=1000)
    await engine.start()

    async def one(number: int) -> str:
        deadline = time.monotonic() - 1 if number % 5 == 0 else None
        task = await submitted(engine, job(max_steps=1 + number % 3, deadline=deadline))
        if number % 7 == 0:
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        except (ResourceExhausted, DeadlineExceeded) as error:
            return error.code
        return "answered"

    ends = await asyncio.gather(*(one(number) for number in range(60)))
    assert len(ends) == 60
    assert set(ends) == {"answered", "cancelled", "resource_exhausted", "deadline_exceeded"}
    await engine.stop()
    assert (engine.live, engine.waiting) == (0, 0)
    assert not any(thread.name.startswith("engine") and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("halting", ["gate", "settle"])
@pytest.mark.parametrize("decode_all", [False, True])
async def test_results_are_the_references(tiny_model: RDT, halting: str, decode_all: bool) -> None:
    tokens, masked = torch.tensor([2, 40, 4, 41, 4, 3]), torch.tensor([False, False, True, False, True, False])
    options = {"max_steps": 6, "threshold": 0.1, "halting": halting, "top_k": 2, "decode_all": decode_all}
    expected = restore(tiny_model, tokens, masked, **options)  # type: ignore[arg-type] # a table of options
    work = Job(tokens.tolist(), masked.tolist(), **options)  # type: ignore[arg-type]
    result = run_reference(tiny_model, work, after_pass=lambda: None, out_of_time=lambda: False)
    assert vars(result) == {**vars(expected), "max_steps": 6, "queue_seconds": 0.0, "compute_seconds": 0.0}


async def test_the_reference_stops_when_time_is_over(tiny_model: RDT) -> None:
    result = run_reference(tiny_model, job(max_steps=8), after_pass=lambda: None, out_of_time=lambda: True)
    assert (result.steps, result.reason, len(result.rows)) == (1, "deadline", 3)


async def _all(tasks: list[asyncio.Task[Result]]) -> list[asyncio.Task[Result]]:
    await asyncio.wait(tasks, timeout=5)
    return tasks


async def _idle(engine: SequentialEngine) -> None:
    async with asyncio.timeout(5):
        while engine.live:
            await asyncio.sleep(0.001)
