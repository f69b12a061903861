"""When memory runs out in a tick: smaller ticks, the same answers, and nobody fails who can still be served."""

from __future__ import annotations

import asyncio
import re
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rdt_core import RDT, Packing
from rdt_core.model import State
from service.engine.backend import Backend, OutOfMemory
from service.engine.eager import EagerBackend
from service.engine.engine import SHORTAGE_SECONDS, BatchingEngine
from service.engine.lookahead import LookaheadBackend
from service.engine.reference import run_reference
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Admission, Job, Outcome, Plan, Reading, Result
from service.errors import Internal, ResourceExhausted, ServiceError, Unavailable
from service.metrics import Metrics
from tests.fakes import FakeClock
from tests.service.engine.scripted import ScriptedBackend, scripted_job, submit

LIMITS = SchedulerLimits(token_budget=32, max_live=8, max_waiting=20, max_waiting_tokens=400)


class Small(ScriptedBackend):
    """Has memory for ticks of so many tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def run(self, plan: Plan) -> Outcome:
        if plan.n_tokens > self.room:
            raise OutOfMemory("none left")
        return super().run(plan)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(FakeClock())


@pytest.fixture
def backend() -> Small:
    return Small(room=12)


@pytest.fixture
async def engine(backend: Small, metrics: Metrics) -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine([backend], LIMITS, watcher=metrics)
    await engine.start()
    yield engine
    await engine.stop()


async def test_smaller_ticks_and_everybody_is_answered(
    engine: BatchingEngine, backend: Small, metrics: Metrics
) -> None:
    jobs = [scripted_job(4, depth) for depth in (1, 2, 3, 4, 5, 6)]
    results = await asyncio.gather(*(submit(engine, job) for job in jobs))
    assert [result.steps for result in results] == [1, 2, 3, 4, 5, 6]
    assert max(plan.n_tokens for plan in backend.ticks) == 12, "24 had been taken, 12 are allowed"
    assert engine.ready, "this is no defect"
    assert metrics.registry.get_sample_value("rdt_out_of_memory_total") == 1
    assert engine.largest_tick == 12
    assert metrics.registry.get_sample_value("rdt_broken_ticks_total") == 0


async def test_what_was_live_begins_anew_and_shows_no_pass_twice(engine: BatchingEngine, backend: Small) -> None:
    seen: list[Reading] = []
    long = asyncio.create_task(submit(engine, scripted_job(4, 50, stream=True), seen.append))
    while len(seen) < 3:
        await asyncio.sleep(0)
    others = [submit(engine, scripted_job(4, 2)) for _ in range(4)]
    await asyncio.gather(*others)
    assert backend.resets == 1
    result = await long
    assert result.steps == 50 == len(result.levels)
    assert [reading.level for reading in seen] == result.levels


async def test_a_text_too_large_for_what_is_left_is_refused(engine: BatchingEngine) -> None:
    with pytest.raises(ResourceExhausted, match="texts of up to 10 tokens can be computed now"):
        await submit(engine, scripted_job(20, 1))
    with pytest.raises(ResourceExhausted, match="up to 10 tokens") as refused:
        await submit(engine, scripted_job(11, 1))
    assert refused.value.reason == "memory", "it tells the caller to wait longer than for a full queue"
    assert (await submit(engine, scripted_job(10, 2))).steps == 2
    assert engine.waiting == engine.live == 0


async def test_a_replica_with_more_memory_takes_what_another_cannot() -> None:
    engine = BatchingEngine([Small(room=10), Small(room=32)], LIMITS)
    await engine.start()
    jobs = [scripted_job(20, 2), scripted_job(20, 2), scripted_job(4, 1), scripted_job(20, 3)]
    results = await asyncio.gather(*(submit(engine, job) for job in jobs))
    await engine.stop()
    assert [result.steps for result in results] == [2, 2, 1, 3]


async def test_no_memory_for_anything_ends_the_process(metrics: Metrics) -> None:
    engine = BatchingEngine([Small(room=0)], LIMITS, watcher=metrics)
    await engine.start()
    with pytest.raises((ResourceExhausted, Unavailable)):
        await submit(engine, scripted_job(4, 1))
    assert engine.failed.is_set()
    await engine.stop()


async def test_memory_for_the_shortest_text_is_enough_to_go_on() -> None:
    engine = BatchingEngine([Small(room=3)], LIMITS)
    await engine.start()
    with pytest.raises(ResourceExhausted, match="up to 3 tokens"):
        await submit(engine, scripted_job(6, 1))
    assert (await submit(engine, scripted_job(3, 2))).steps == 2
    assert not engine.failed.is_set()
    await engine.stop()


async def test_callers_who_left_do_not_come_back(engine: BatchingEngine, backend: Small) -> None:
    leaving = asyncio.create_task(submit(engine, scripted_job(8, 10**6)))
    while not backend.ticks:
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(*(submit(engine, scripted_job(4, 2)) for _ in range(5)))
    assert engine.waiting == engine.live == 0


async def test_warming_finds_how_much_there_is_room_for(backend: Small, metrics: Metrics) -> None:
    engine = BatchingEngine([backend], LIMITS, watcher=metrics)
    await engine.warm([[scripted_job(8, 1)] * n for n in (4, 2, 1)])
    assert engine.largest_tick == 8
    assert [plan.n_tokens for plan in backend.ticks] == [8]
    assert backend.resets == 3, "nothing of it stays"
    await engine.start()
    assert (await submit(engine, scripted_job(8, 3))).steps == 3
    await engine.stop()


async def test_warming_forgives_one_shortage_of_what_worked_before() -> None:
    backend = ScriptedBackend()
    engine = BatchingEngine([backend], LIMITS)
    await engine.warm([[scripted_job(8, 1)] * 4])
    backend.errors.append(OutOfMemory("somebody has it"))
    await engine.warm([[scripted_job(8, 1)] * 2])
    assert engine.largest_tick == 32
    await engine.stop()


async def test_the_real_backend_answers_as_if_nothing_had_happened(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own error in the middle of a tick, when all are at different depths."""
    jobs = [
        Job([2, *([4, 40 + i] * (1 + i % 3)), 3], [False, *([True, False] * (1 + i % 3)), False], 3 + i, 0.0, halting)
        for i, halting in enumerate(("gate", "settle") * 4)
    ]
    expected = [run_reference(tiny_model, job) for job in jobs]
    forward, ticks = RDT.forward, 0

    def scarce(*arguments: object) -> object:
        nonlocal ticks
        ticks += 1
        if ticks in (3, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RDT, "forward", scarce)
    engine = BatchingEngine([EagerBackend(tiny_model)], replace(LIMITS, token_budget=64))
    await engine.start()
    results = await asyncio.gather(*(submit(engine, job) for job in jobs))
    await engine.stop()
    assert [(result.tokens, result.steps) for result in results] == [(one.tokens, one.steps) for one in expected]


@pytest.mark.parametrize("kind", [EagerBackend, LookaheadBackend])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ],
)
def test_whatever_says_so_and_nothing_of_the_tick_stays_in_memory(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, kind: type[Backend], error: Exception
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def scarce(_model: RDT, state: State, *_: object) -> None:
        large = state.hidden.clone()
        tensors.append(weakref.ref(large))
        raise error.with_traceback(None)

    monkeypatch.setattr(RDT, "forward", scarce)
    backend = EagerBackend(tiny_model) if kind is EagerBackend else LookaheadBackend(tiny_model, 64, 8)
    job = Job([2, 4, 3], [False, True, False], 3, 0.0, "gate")
    with pytest.raises(OutOfMemory, match=re.escape(str(error)) or "out of memory") as found:
        backend.run(Plan((Admission(1, job, 3),), live=(1,)))
    assert found.value.__context__ is None
    error.__traceback__ = None  # this test holds the error, which a backend does not
    assert tensors[0]() is None


@pytest.mark.parametrize("kind", [EagerBackend, LookaheadBackend])
def test_a_backend_that_forgets_gives_memory_back_to_the_card(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, kind: type[Backend]
) -> None:
    """And lets go of its own before."""
    backend = EagerBackend(tiny_model) if kind is EagerBackend else LookaheadBackend(tiny_model, 64, 8)
    job = Job([2, 4, 3], [False, True, False], 3, 0.0, "gate", stream=True)
    backend.run(Plan((Admission(1, job, 3),), live=(1,)))
    eager = backend if isinstance(backend, EagerBackend) else backend._eager
    assert eager.tickets
    emptied: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(eager.tickets))
    monkeypatch.setattr(eager, "_model", SimpleNamespace(device=torch.device("cuda:0")))
    backend.reset()
    assert emptied == [()]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx(...)`",
    ],
)
def test_other_errors_are_defects(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(RDT, "forward", broken)
    job = Job([2, 4, 3], [False, True, False], 3, 0.0, "gate")
    for backend in (EagerBackend(tiny_model), LookaheadBackend(tiny_model, 64, 8)):
        with pytest.raises(RuntimeError, match=re.escape(said)):
            backend.run(Plan((Admission(1, job, 3),), live=(1,)))


async def test_what_has_worked_before_is_tried_again_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """A small tick meets a shortage of somebody else's, such as a model that warms beside this one."""
    backend = ScriptedBackend()
    engine = BatchingEngine([backend], LIMITS)
    await engine.warm([[scripted_job(8, 1)] * 4])
    await engine.start()
    backend.errors.append(OutOfMemory("somebody has it"))
    assert (await submit(engine, scripted_job(4, 3))).steps == 3
    assert engine.largest_tick == 32
    assert "32 at the most" in caplog.text
    await engine.stop()


async def test_a_shortage_that_stays_costs_half_again_and_again_and_passes() -> None:
    clock, backend = FakeClock(), ScriptedBackend()
    engine = BatchingEngine([backend], LIMITS, clock)
    await engine.warm([[scripted_job(8, 1)] * 4])
    await engine.start()
    backend.errors += [OutOfMemory("somebody has it")] * 3
    assert (await submit(engine, scripted_job(4, 3))).steps == 3
    assert engine.largest_tick == 8, "tried again, then half, then half of that"
    for seconds, largest in ((59, 8), (1, 16), (59, 16), (1, 32), (60, 32)):
        clock.now += seconds
        await submit(engine, scripted_job(2, 1))
        assert engine.largest_tick == largest
    await engine.stop()


async def test_a_shortage_that_stays_is_given_time_to_pass() -> None:
    """Tried without a pause, budgets would be halved to nothing before others could give memory back."""
    tried: list[float] = []

    class Timed(ScriptedBackend):
        def run(self, plan: Plan) -> Outcome:
            tried.append(time.monotonic())
            return super().run(plan)

    backend = Timed()
    engine = BatchingEngine([backend], LIMITS)
    await engine.warm([[scripted_job(8, 1)] * 4])
    await engine.start()
    tried.clear()
    backend.errors += [OutOfMemory("somebody has it")] * 3
    await submit(engine, scripted_job(4, 1))
    await engine.stop()
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert min(pauses[1:]) > 0.9 * SHORTAGE_SECONDS, "from the second shortage on"


async def test_a_shortage_passes_for_who_alone_asks_for_much() -> None:
    clock, backend = FakeClock(), ScriptedBackend()
    engine = BatchingEngine([backend], LIMITS, clock)
    await engine.warm([[scripted_job(8, 1)] * 4])
    await engine.start()
    backend.errors += [OutOfMemory("somebody has it")] * 2
    await submit(engine, scripted_job(4, 1))
    with pytest.raises(ResourceExhausted, match="texts of up to 16 tokens"):
        await submit(engine, scripted_job(32, 1))
    clock.now += 60
    assert (await submit(engine, scripted_job(32, 1))).steps == 1
    await engine.stop()


async def test_what_there_was_no_room_for_from_the_start_is_not_tried_again(backend: Small) -> None:
    clock = FakeClock()
    engine = BatchingEngine([backend], LIMITS, clock)
    await engine.warm([[scripted_job(8, 1)] * n for n in (4, 2, 1)])
    await engine.start()
    clock.now += 1000
    await submit(engine, scripted_job(2, 1))
    assert engine.largest_tick == 8
    await engine.stop()


@pytest.mark.parametrize(
    ("error", "end"), [(OutOfMemory("none left"), Unavailable), (RuntimeError("broken"), Internal)]
)
async def test_a_backend_that_cannot_forget_ends_the_engine_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception, end: type[ServiceError]
) -> None:
    backend = ScriptedBackend()
    backend.errors.append(error)
    monkeypatch.setattr(backend, "reset", lambda: 1 / 0)
    engine = BatchingEngine([backend], LIMITS)
    await engine.start()
    with pytest.raises(end):
        await submit(engine, scripted_job(20, 1))
    await asyncio.wait_for(engine.failed.wait(), timeout=5)
    async with asyncio.timeout(5):
        await engine.drain(grace_seconds=60)
        await engine.stop()


async def test_what_another_model_left_no_room_for_is_tried_once_it_may_be_gone(backend: Small) -> None:
    """As at a reload, when the old model is still there."""
    clock = FakeClock()
    engine = BatchingEngine([backend], LIMITS, clock)
    backend.room = 8
    await engine.warm([[scripted_job(8, 1)] * n for n in (4, 2, 1)], alone=False)
    assert engine.largest_tick == 8
    await engine.start()
    backend.room = 16
    for seconds, tokens, largest in ((60, 16, 16), (60, 8, 32), (0, 32, 16), (1000, 8, 16)):
        clock.now += seconds
        await asyncio.gather(*(submit(engine, scripted_job(8, 1)) for _ in range(tokens // 8)))
        assert engine.largest_tick == largest
    await engine.stop()


@pytest.mark.parametrize("kind", [EagerBackend, LookaheadBackend])
@pytest.mark.parametrize("steps", [1, 3])
async def test_a_vocabulary_that_finds_no_memory_makes_ticks_smaller(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, kind: type[EagerBackend | LookaheadBackend], steps: int
) -> None:
    """Passes find some all the time: without an end, the same jobs would begin anew for ever."""
    decode, room = RDT.decode, 1000

    def scarce(model: RDT, hidden: Tensor, packing: Packing, rows: Tensor) -> Tensor:
        if len(rows) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, hidden, packing, rows)

    monkeypatch.setattr(RDT, "decode", scarce)
    backend = EagerBackend(tiny_model) if kind is EagerBackend else LookaheadBackend(tiny_model, 32, 8)
    engine = BatchingEngine([backend], LIMITS)
    await engine.warm([[Job([5] * 8, [True] * 8, 1, 0.0, "gate")] * 4])
    await engine.start()
    room = 10
    jobs = [Job([5 + i] * 8, [True] * 8, steps, 0.0, "gate") for i in range(4)]
    long = Job([5] * 12, [True] * 12, steps, 0.0, "gate")
    async with asyncio.timeout(20):
        *results, refused = await asyncio.gather(
            *(submit(engine, job) for job in (*jobs, long)), return_exceptions=True
        )
    await engine.stop()
    assert isinstance(refused, ResourceExhausted)
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, Result)
        assert result.tokens == run_reference(tiny_model, job).tokens
