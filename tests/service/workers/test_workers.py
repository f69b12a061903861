"""What callers of a worker are promised is what callers of an engine in the same process are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rdt_core import ModelConfig, Tokenizer
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job, Reading, Result
from service.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted, Unavailable
from service.schema import DenoiseAnswer
from service.settings import Settings
from service.workers import remote, wire
from service.workers.messages import Answered, Pass, Submit
from service.workers.worker import Worker
from tests.service.engine.scripted import HeldBackend, scripted_job
from tests.service.workers.fleet import Fleet, OneEngine, ask, brief, denoiser_of, running, until

LIMITS = SchedulerLimits(token_budget=32, max_live=1, max_waiting=3, max_waiting_tokens=100)
ENDLESS = brief(max_steps=10**6)


@pytest.fixture
def held() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
async def fleet(
    tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, held: HeldBackend
) -> AsyncIterator[Fleet]:
    settings = Settings(max_waiting=LIMITS.max_waiting, max_waiting_tokens=LIMITS.max_waiting_tokens)
    host = OneEngine([held], LIMITS)
    async with running(
        Fleet(tmp_path / "engine", host, settings), denoiser_of(tiny_tokenizer, tiny_config, host.engine)
    ) as fleet:
        yield fleet
        held.let_go(1000)


async def asked(worker: Worker, fields: dict[str, object]) -> asyncio.Task[DenoiseAnswer]:
    """A request under way: it has left the worker."""
    n_before = len(worker.link._asked)
    task = asyncio.create_task(ask(worker, fields))
    await until(lambda: len(worker.link._asked) > n_before or task.done())
    return task


async def live(fleet: Fleet, worker: Worker, held: HeldBackend, **fields: object) -> asyncio.Task[DenoiseAnswer]:
    task = await asked(worker, ENDLESS | fields)
    await asyncio.to_thread(held.wait_until_started)
    assert fleet.host.live == 1
    return task


async def test_an_answer(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    held.let_go(2)
    answer = await ask(worker, brief(max_steps=2))
    assert (answer.steps, answer.halt_reason, answer.model) == (2, "max_steps", "tiny@" + "a" * 12)
    assert not worker.link._asked
    assert not next(iter(fleet.server._peers.values())).tasks


async def test_callers_of_all_workers_share_the_batch_and_the_queue(fleet: Fleet, held: HeldBackend) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    first = await live(fleet, one, held, max_steps=1)
    second = await asked(other, brief())
    await until(lambda: fleet.host.waiting == 1)
    held.let_go(2)
    assert [(await task).steps for task in (first, second)] == [1, 1]


async def test_a_full_queue_refuses_at_once_and_the_engine_has_the_last_word(fleet: Fleet, held: HeldBackend) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    await live(fleet, one, held)
    burst = [asyncio.create_task(ask(worker, ENDLESS)) for worker in (one, other) * 3]  # before a word of the queue
    await until(lambda: sum(task.done() for task in burst) == 3)
    assert fleet.host.waiting == 3
    for task in burst:
        if task.done():
            assert isinstance(error := task.exception(), ResourceExhausted)
            assert error.reason == "queue_requests"
        task.cancel()


async def test_a_worker_refuses_on_what_it_was_told_before_any_work(
    fleet: Fleet, held: HeldBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    tasks = [await live(fleet, one, held), *[await asked(one, ENDLESS) for _ in range(3)]]
    await until(lambda: other.link.status.waiting == 3)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: 1 / 0)
    with pytest.raises(ResourceExhausted):
        await ask(other, brief())
    for task in tasks:
        task.cancel()
    monkeypatch.undo()
    await until(lambda: other.link.status.waiting == 0)
    held.let_go(3)  # one that was under way, perhaps one to drop it, and one for this
    assert (await ask(other, brief())).steps == 1


async def test_nothing_piles_up_in_front_of_an_engine_that_does_not_read(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await fleet.worker()
    monkeypatch.setattr(wire, "CROWDED_BYTES", -1)
    with pytest.raises(ResourceExhausted, match="behind"):
        await ask(worker, brief())


async def test_places_being_prepared_count(fleet: Fleet) -> None:
    engine = (await fleet.worker()).lifecycle.denoiser.engine
    with engine.reserve(), engine.reserve(), engine.reserve(), pytest.raises(ResourceExhausted):
        engine.reserve().__enter__()
    with engine.reserve():
        pass  # there is room again


async def test_a_caller_who_leaves_frees_the_tokens_within_a_tick(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    gone = await live(fleet, worker, held)
    waiting = await asked(worker, ENDLESS)
    follower = await asked(worker, brief())
    await until(lambda: fleet.host.waiting == 2)
    gone.cancel()
    waiting.cancel()
    await until(lambda: fleet.host.waiting == 1)
    held.let_go(2)
    assert (await follower).steps == 1
    assert len(held.ticks) == 2, "one with the job that was left, one with its follower"
    assert gone.cancelled()
    assert waiting.cancelled()


async def test_a_deadline_in_the_line_is_answered_on_time(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    busy = await live(fleet, worker, held)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask(worker, ENDLESS | {"timeout_ms": 50})
    assert time.monotonic() - began < 2
    busy.cancel()


async def test_a_deadline_while_live_gives_what_is_there(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    task = await live(fleet, worker, held, timeout_ms=60_000)
    fleet.host.engine._clock = lambda: 61 + time.monotonic()
    held.let_go(2)
    answer = await task
    assert answer.halt_reason == "deadline"
    assert answer.steps <= 2, "the pass under way, and perhaps one that was planned when the deadline passed"


async def test_only_time_that_is_left_goes_over_the_wire(fleet: Fleet, held: HeldBackend) -> None:
    """The two clocks may have nothing to do with each other."""
    fleet.server._clock = lambda: 1e9 + time.monotonic()
    fleet.host.engine._clock = fleet.server._clock
    worker = await fleet.worker()
    task = await live(fleet, worker, held, timeout_ms=60_000)
    fleet.host.engine._clock = lambda: 1e9 + 61 + time.monotonic()
    held.let_go(2)
    assert (await task).halt_reason == "deadline"


async def test_a_stream_sees_every_pass(fleet: Fleet, held: HeldBackend) -> None:
    denoiser = (await fleet.worker()).lifecycle.denoiser
    held.let_go(3)
    request = denoiser.read(brief(max_steps=3))
    events = [event async for event in denoiser.denoise_stream(request, "rest")]
    assert [getattr(event, "step", None) for event in events[:-1]] == [1, 2, 3]
    assert isinstance(events[-1], DenoiseAnswer)


async def test_a_stream_that_is_left_is_left_in_the_engine(fleet: Fleet, held: HeldBackend) -> None:
    denoiser = (await fleet.worker()).lifecycle.denoiser
    events = denoiser.denoise_stream(denoiser.read(ENDLESS), "rest")
    held.let_go(1)
    await anext(events)
    await events.aclose()
    held.let_go(1)
    await until(lambda: fleet.host.live == 0)


async def test_passes_travel_only_for_those_who_watch(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    heard: list[object] = []
    hear = worker.link._heard
    assert worker.link.wire is not None
    worker.link.wire._on_message = lambda wire, message: (heard.append(message), hear(wire, message))  # type: ignore[func-returns-value]
    held.let_go(3)
    await ask(worker, brief(max_steps=3))
    assert not any(isinstance(message, Pass) for message in heard)


async def test_a_worker_that_dies_loses_only_its_callers(fleet: Fleet, held: HeldBackend) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    lost = await live(fleet, one, held)
    waits = await asked(one, ENDLESS)
    stays = await asked(other, brief())
    await until(lambda: fleet.host.waiting == 2)
    one.link.run = asyncio.sleep  # type: ignore[method-assign, assignment]
    assert one.link.wire is not None
    one.link.wire.abort()
    await until(lambda: fleet.host.waiting == 1)
    held.let_go(2)
    assert (await stays).steps == 1
    for task in (lost, waits):
        with pytest.raises(Unavailable, match="lost"):
            await task


async def test_an_engine_that_dies_fails_its_callers_at_once_and_a_new_one_is_found(
    fleet: Fleet, held: HeldBackend, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    workers = [await fleet.worker(), await fleet.worker()]
    lost = [await live(fleet, workers[0], held), await asked(workers[1], ENDLESS)]
    await fleet.die()
    for task in lost:
        with pytest.raises(Unavailable, match="send the request again") as failure:
            await asyncio.wait_for(task, 1)
        assert failure.value.reason == "failed"
    for worker in workers:
        assert worker.lifecycle.state == "failed"
        with pytest.raises(Unavailable):
            await ask(worker, brief())

    fresh = HeldBackend()
    host = OneEngine([fresh], LIMITS)
    again = Fleet(fleet.path, host, fleet.settings)
    fresh.let_go(2)
    async with running(again, denoiser_of(tiny_tokenizer, tiny_config, host.engine, digest="b" * 64)):
        for worker in workers:
            await until(lambda worker=worker: worker.lifecycle.state == "ready")
            assert (await ask(worker, brief())).model == "tiny@" + "b" * 12


async def test_an_engine_that_breaks_for_a_moment_makes_workers_unready(fleet: Fleet) -> None:
    worker = await fleet.worker()
    fleet.host.engine._broken = True
    await until(lambda: worker.lifecycle.state == "failed")
    fleet.host.engine._broken = False
    await until(lambda: worker.lifecycle.state == "ready")


async def test_a_broken_tick_fails_its_jobs_with_the_engines_words(fleet: Fleet, held: HeldBackend) -> None:
    task = await live(fleet, await fleet.worker(), held)
    held.errors.append(RuntimeError("a broken kernel"))
    held.let_go(1)
    with pytest.raises(Internal, match="the model failed while this request was live"):
        await task


async def test_whatever_the_engine_raises_comes_back_without_its_words(fleet: Fleet) -> None:
    worker = await fleet.worker()
    fleet.host.engine.reserve = lambda: 1 / 0
    with pytest.raises(Internal, match="logged"):
        await ask(worker, brief())


async def test_a_drain_finishes_what_was_accepted(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    engine = worker.lifecycle.denoiser.engine
    accepted = await live(fleet, worker, held, max_steps=1)
    draining = asyncio.create_task(worker.drain(10))
    await asyncio.sleep(0)
    assert worker.lifecycle.state == "draining"
    with pytest.raises(Unavailable, match="shutting down"):
        await ask(worker, brief())
    await until(lambda: not engine.ready)  # once all that came before has reached it
    with pytest.raises(Unavailable, match="shutting down"):
        engine.reserve()
    assert not draining.done()
    held.let_go(1)
    assert (await accepted).steps == 1
    await asyncio.wait_for(draining, 1)


async def test_the_grace_period_is_the_longest_wait(fleet: Fleet, held: HeldBackend) -> None:
    worker = await fleet.worker()
    endless = await live(fleet, worker, held)
    await worker.drain(0.01)
    with pytest.raises(Unavailable, match="shut down before"):
        await endless
    held.let_go(1)
    await until(lambda: fleet.host.live == 0)


async def test_a_job_of_a_model_that_is_gone_ends(fleet: Fleet) -> None:
    worker = await fleet.worker()
    job = scripted_job(2, depth=1)
    with pytest.raises(Unavailable):
        await worker.link.ask(lambda number: Submit(number, "c" * 64, job, None, watched=False), Answered)


async def test_a_model_taken_up_late_is_not_served_on_another_connection(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    """The connection breaks while the tokenizer is being read."""
    worker = await fleet.worker()
    wire = worker.link.wire
    assert wire is not None
    worker._tokenizer, opened = None, []

    async def slow(*_: object) -> Tokenizer:
        if not opened:
            wire.abort()
            await until(lambda: worker.link.wire not in (None, wire))
        return tiny_tokenizer

    open_one = worker.lifecycle.open
    monkeypatch.setattr(asyncio, "to_thread", slow)
    monkeypatch.setattr(worker.lifecycle, "open", lambda denoiser: (open_one(denoiser), opened.append(denoiser)))
    assert fleet.server.models.serving is not None
    worker._hear(wire, fleet.server.models.serving)
    await until(lambda: opened)
    assert not opened[0].engine.ready
    await until(lambda: worker.lifecycle.state == "ready")
    assert opened[-1] is not opened[0]


async def test_spans_are_made_where_the_call_is(fleet: Fleet, held: HeldBackend) -> None:
    """Every pass reaches the timeline, as does the result with its times."""
    worker = await fleet.worker()
    seen: list[Reading] = []
    ends: list[tuple[Job, Result, str]] = []

    class Timeline:
        def __call__(self, reading: Reading) -> None:
            seen.append(reading)

        def answered(self, job: Job, result: Result, model: str) -> None:
            ends.append((job, result, model))

    worker.lifecycle.denoiser._tracer = SimpleNamespace(timeline=Timeline)  # type: ignore[assignment]
    held.let_go(3)
    await ask(worker, brief(max_steps=3))
    assert [reading.level for reading in seen] == ends[0][1].levels
    assert ends[0][1].compute_seconds > 0


async def test_an_engine_that_is_to_end_waits_for_its_workers(
    fleet: Fleet, held: HeldBackend, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await fleet.worker()
    accepted = await live(fleet, worker, held, max_steps=1)
    leaving = asyncio.create_task(fleet.server.left(10))
    held.let_go(1)
    assert (await accepted).steps == 1
    assert not leaving.done()
    await worker.stop()
    await asyncio.wait_for(leaving, 1)
    await fleet.worker()
    await fleet.server.left(0.01)
    assert "1 workers are left" in caplog.text


async def test_a_refused_reload_says_why(fleet: Fleet) -> None:
    with pytest.raises(FailedPrecondition, match="this one stays"):
        await (await fleet.worker()).reload()


async def test_an_engine_that_stands_still_is_lost(
    fleet: Fleet, held: HeldBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.02)
    worker = await fleet.worker()
    task = await live(fleet, worker, held)
    for telling in fleet.server._tasks:
        telling.cancel()
    with pytest.raises(Unavailable, match="the engine was lost"):
        await asyncio.wait_for(task, timeout=5)
    assert worker.lifecycle.state == "failed"
    assert "the engine has said nothing for" in caplog.text


@pytest.mark.parametrize("turns", range(5))
async def test_a_link_that_is_told_to_end_ends_whatever_else_happens_then(tmp_path: Path, turns: int) -> None:
    link = remote.Link(tmp_path / "engine", "0.0", lambda *_: None)
    watching = asyncio.create_task(link._watch(wire.Wire(lambda *_: None, lambda _: None)))
    await asyncio.sleep(0.001)
    link._lost.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    if watching.cancel():
        with pytest.raises(asyncio.CancelledError):
            await watching
