"""Looking a tick ahead must not be seen in any answer. Only `Card` is asynchronous here; all else is as on a card."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rdt_core import RDT, ModelConfig, packing
from rdt_core.layers import packed_attention, padded_attention
from rdt_core.packing import Packing
from rdt_core.precision import prepare
from service.engine import lookahead, static_batch
from service.engine.eager import GO_ON, REASONS, Decoded, EagerBackend
from service.engine.engine import BatchingEngine
from service.engine.lookahead import LookaheadBackend
from service.engine.reference import run_reference
from service.engine.scheduler import ANSWER_SECONDS, Scheduler, SchedulerLimits
from service.engine.static_batch import (
    Bucket,
    Buffers,
    PlainPasses,
    Size,
    close_up,
    lay_out,
    one_pass,
    sizes_up_to,
)
from service.engine.types import Admission, Job, Plan, Reading, Result
from tests.service.engine.scripted import put, submit
from tests.service.engine.tape import Card
from tests.service.engine.test_eager import LIMITS, check_against_the_reference, random_job, run_all


def backend_of(model: RDT) -> LookaheadBackend:
    return LookaheadBackend(model, LIMITS.token_budget, LIMITS.max_live)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_mix_answers_as_the_reference_does(tiny_model: RDT, seed: int, prepared: bool) -> None:
    rng = random.Random(seed)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]
    served = prepare(copy.deepcopy(tiny_model)) if prepared else tiny_model
    check_against_the_reference(tiny_model, jobs, run_all(backend_of(served), jobs, rng))


@pytest.mark.parametrize(
    "changes",
    [
        {"level_conditioning": True, "n_prelude_layers": 1},
        {"decoder_type": "transformer", "n_decoder_layers": 1, "gate_shortlist": 0},
        {"norm": "post", "positions": "learned", "decoder_type": "dense"},
    ],
)
@pytest.mark.parametrize("make", [backend_of, EagerBackend])
def test_models_with_other_parts(tiny_config: ModelConfig, changes: dict[str, object], make: Any) -> None:
    torch.manual_seed(0)
    model = RDT(tiny_config.with_changes(**changes)).eval().requires_grad_(False)
    rng = random.Random(5)
    jobs = [random_job(rng, tiny_config.vocab_size) for _ in range(20)]
    check_against_the_reference(model, jobs, run_all(make(model), jobs, rng))


@pytest.mark.parametrize("seed", range(2))
def test_a_card_is_waited_for_only_where_its_results_are_read(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Nothing is read before it is there, and nothing but readings makes the host wait."""
    rng = random.Random(seed)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(30)]
    jobs = [replace(job, halting="gate", stream=False) for job in jobs]  # others are read after every pass
    backend = backend_of(tiny_model)
    card = Card(*tiny_model.parameters(), *tiny_model.buffers(), *backend._buffers)
    monkeypatch.setattr(lookahead, "to_host", card.to_host)
    for module in (lookahead, packing, static_batch):
        monkeypatch.setattr(module, "to_device", card.to_device)
    with card:
        results = run_all(backend, jobs, rng)
    check_against_the_reference(tiny_model, jobs, results)


def plain_job(n_masked: int = 2, depth: int = 3, **changes: object) -> Job:
    tokens = [2, *([4] * n_masked), 40, 3]
    masked = [token == 4 for token in tokens]
    return Job(tokens, masked, max_steps=depth, threshold=0.0, halting="gate", **changes)  # type: ignore[arg-type]


class CountedPasses(PlainPasses):
    """Of each pass, how many sequences were in it."""

    def __init__(self, model: RDT) -> None:
        super().__init__(model)
        self.live: list[int] = []

    def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
        self.live.append(int(bucket.offsets.diff().count_nonzero()))
        super().__call__(buffers, bucket)


@pytest.mark.parametrize(
    ("changes", "reasons", "live"),
    [
        ({}, [[], [None], ["max_steps"]], [1, 1]),
        ({"deadline": ANSWER_SECONDS / 2}, [[], ["deadline"]], [1]),
        ({"threshold": 2.0, "max_steps": 9}, [[], [], ["gate"]], [1, 1]),
        ({"threshold": 2.0, "max_steps": 1}, [[], ["gate"]], [1]),
    ],
    ids=["ceiling", "deadline", "gate", "gate at the ceiling"],
)
def test_only_who_is_stopped_by_the_gate_before_the_end_is_in_one_pass_more(
    tiny_model: RDT, changes: dict[str, Any], reasons: list[list[object]], live: list[int]
) -> None:
    """Readings come a tick late, and so do last ones, unless the host could not know beforehand that they would be."""
    passes, scheduler = CountedPasses(tiny_model), Scheduler(LIMITS)
    backend = LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, passes)
    job = replace(plain_job(depth=2), **changes)
    put(scheduler.queue, job)
    told: list[list[Reading]] = []
    while not scheduler.idle:
        plan = scheduler.plan(now=0.0, ticks_late=backend.ticks_late)
        outcome = backend.run(plan)
        told.append(list(outcome.readings.values()))
        finished = scheduler.commit(plan, outcome, now=0.0)
    assert [[reading.reason for reading in readings] for readings in told] == reasons
    assert passes.live == live
    [(_, result)] = finished
    assert result.steps == len(result.levels) == sum(map(len, reasons)), "a pass too many is counted nowhere"
    assert result.tokens == run_reference(tiny_model, replace(job, max_steps=result.steps)).tokens


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_with_ceilings_costs_no_pass_too_many(tiny_model: RDT, seed: int) -> None:
    rng, passes = random.Random(seed), CountedPasses(tiny_model)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(40)]
    jobs = [replace(job, threshold=0.0, halting="gate", stream=False) for job in jobs]
    results = run_all(LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, passes), jobs, rng)
    check_against_the_reference(tiny_model, jobs, results)
    assert sum(passes.live) == sum(job.max_steps for job in jobs)


def test_decoding_is_timed_without_the_pass_before_it(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    now, until, to_host, decode = 0.0, 0.0, lookahead.to_host, RDT.decode  # the card is busy until `until`

    def busy(seconds: float) -> None:
        nonlocal until
        until = max(until, now) + seconds

    def wait(for_what: float) -> None:
        nonlocal now
        now = max(now, for_what)

    class SlowPasses(PlainPasses):
        def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
            busy(4.0)
            super().__call__(buffers, bucket)

    monkeypatch.setattr(lookahead, "to_host", lambda *some: (to_host(*some)[0], partial(wait, until)))
    monkeypatch.setattr(RDT, "decode", lambda *some: busy(0.25) or decode(*some))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    backend = LookaheadBackend(tiny_model, LIMITS.token_budget, LIMITS.max_live, SlowPasses(tiny_model))
    admitted = Admission(0, plain_job(depth=1), 1), Admission(1, plain_job(depth=9), 9)
    outcomes = [backend.run(Plan(admitted, live=(0, 1)))]
    outcomes += [backend.run(Plan(live=live)) for live in ((0, 1), (1,))]
    assert [(outcome.n_decoded, outcome.decode_seconds) for outcome in outcomes] == [(0, 0.0), (2, 0.25), (0, 0.0)]


def test_decoding_beside_the_bucket_counts_too(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(tiny_model)
    admitted = Admission(0, plain_job(depth=1), 1), Admission(1, plain_job(n_masked=3, depth=2, stream=True), 2)
    backend.run(Plan(admitted, live=(0, 1)))
    monkeypatch.setattr(time, "perf_counter", count().__next__)
    outcome = backend.run(Plan(live=(0, 1)))
    assert (outcome.n_decoded, outcome.decode_seconds) == (2 + 3, 1 + 1)


@pytest.mark.parametrize("deadline", [20.0, 20.25, 20.75])
@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_is_told_in_the_tick_before_its_deadline(tiny_model: RDT, ahead: bool, deadline: float) -> None:
    backend, scheduler = backend_of(tiny_model) if ahead else EagerBackend(tiny_model), Scheduler(LIMITS)
    put(scheduler.queue, plain_job(depth=1000, deadline=deadline))
    now, finished = 0.0, []
    while not finished:
        plan = scheduler.plan(now, ticks_late=backend.ticks_late)
        outcome = backend.run(plan)
        now += 1.0
        finished = scheduler.commit(plan, outcome, now)
    assert deadline - 1 <= now <= deadline
    assert finished[0][1].reason == "deadline"


def test_who_is_dropped_is_gone_and_the_others_stay(tiny_model: RDT) -> None:
    backend, scheduler = backend_of(tiny_model), Scheduler(LIMITS)
    jobs = [replace(plain_job(n_masked=1 + i, depth=6), halting=["gate", "settle"][i // 4]) for i in range(8)]
    tickets = [put(scheduler.queue, job) for job in jobs]
    results: dict[int, Result] = {}
    for tick in range(20):
        if tick == 2:
            scheduler.cancel(tickets[1])
            scheduler.cancel(tickets[5])
        plan = scheduler.plan(now=0.0)
        results.update(scheduler.commit(plan, backend.run(plan), now=0.0))
        if scheduler.idle:
            break
    assert sorted(results) == [ticket for ticket in tickets if ticket not in (tickets[1], tickets[5])]
    check_against_the_reference(tiny_model, [jobs[tickets.index(ticket)] for ticket in results], [*results.values()])


def test_after_a_reset_nothing_is_left(tiny_model: RDT) -> None:
    backend, rng = backend_of(tiny_model), random.Random(9)
    jobs = [replace(plain_job(depth=6), halting=halting) for halting in ("gate", "settle")]
    backend.run(Plan(tuple(Admission(i, job, 6) for i, job in enumerate(jobs)), live=(0, 1)))
    backend.reset()
    check_against_the_reference(tiny_model, jobs, run_all(backend, jobs, rng))


async def test_warming_goes_all_the_way_through_the_vocabulary(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = RDT.decode

    def counted(model: RDT, hidden: torch.Tensor, packing: Any, rows: Any = None) -> torch.Tensor:
        decoded.append(len(rows))
        return decode(model, hidden, packing, rows)

    monkeypatch.setattr(RDT, "decode", counted)
    engine = BatchingEngine([backend_of(tiny_model)], LIMITS)
    await engine.warm([[plain_job(n_masked=3, depth=1)] * 4, [plain_job(depth=1)]])
    assert decoded == [12, 2]


async def test_in_the_engine_deadlines_hold_and_every_job_ends_once(tiny_model: RDT) -> None:
    engine = BatchingEngine([backend_of(tiny_model), backend_of(tiny_model)], SchedulerLimits(80, 8, 100, 10_000))
    await engine.start()
    rng = random.Random(3)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]

    loop = asyncio.get_running_loop()
    endless = plain_job(depth=10**9, deadline=loop.time() + 0.3)
    late, *results = await asyncio.gather(*(submit(engine, job) for job in (endless, *jobs)))
    assert late.reason == "deadline"
    assert late.steps > 1
    check_against_the_reference(tiny_model, jobs, results)
    await engine.drain(1)
    assert engine.live == engine.waiting == 0
    await engine.stop()


def test_a_pass_leaves_frozen_and_dead_rows_alone(tiny_model: RDT) -> None:
    buffers = Buffers.of(tiny_model, 64, 9)
    for buffer in (buffers.hidden, buffers.embedded):
        buffer.normal_()
    bucket = lay_out(buffers, [5, 7, 4], Size(64, 9))
    assert (max(bucket.lengths), bucket.longest) == (48, 7), "dead rows are no sequence to attention"
    buffers.reason[:3] = torch.tensor([0, 1, 0])
    buffers.hidden[16:] = torch.nan  # whatever is there
    buffers.level[:3], buffers.ceiling[:3] = 1.0, 10
    before = buffers.hidden.clone()
    with torch.inference_mode():
        one_pass(tiny_model, buffers, bucket)
    changed = (buffers.hidden != before).any(1) & ~before.isnan().any(1)
    assert changed.nonzero().squeeze(1).tolist() == [*range(5), *range(12, 16)]
    assert buffers.hidden[:16].isfinite().all()
    assert buffers.step[:3].tolist() == [1, 0, 1]
    assert buffers.level[1] == 1.0
    assert buffers.level[:3].isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"level_conditioning": True}, {"norm": "post", "positions": "learned"}])
def test_a_pass_asks_for_no_value_and_fits_every_size(tiny_config: ModelConfig, changes: dict[str, object]) -> None:
    """Fake tensors have shapes and no values: whatever wants to know one fails, as it would in a capture."""
    with FakeTensorMode():
        model = RDT(tiny_config.with_changes(**changes)).eval().requires_grad_(False)
        buffers = Buffers.of(model, *sizes_up_to(400, 60)[-1])
        for size in sizes_up_to(400, 60):
            bucket = buffers.bucket(size, lengths=(16,) * (size.n_rows // 16), longest_live=16)
            one_pass(model, buffers, bucket)
            close_up(buffers, [(1, range(4)), (3, range(8, 12))])
            rows = torch.zeros(5, dtype=torch.int64)
            decoded = Decoded.of(model, buffers.hidden[: size.n_rows], bucket, rows, top_k=2)
            assert (decoded.tokens.shape, decoded.top_tokens.shape) == ((5,), (5, 2))
        with pytest.raises(DataDependentOutputException):
            buffers.level[0].item()


def test_a_batch_that_has_every_slot_taken_leaves_the_last_to_the_dead_rows(tiny_model: RDT) -> None:
    buffers = Buffers.of(tiny_model, 96, 13)
    buffers.masked[:], buffers.reason[:] = True, 0  # as whoever lay there before left it
    bucket = lay_out(buffers, [5, 7, 4], Size(64, 4))
    assert bucket.sequence_ids.tolist() == [0] * 5 + [1] * 7 + [2] * 4 + [3] * 48
    assert bucket.offsets.tolist() == [0, 5, 12, 16, 16]
    assert buffers.masked.nonzero().squeeze(1).tolist() == [*range(16), *range(64, 96)]
    assert REASONS[buffers.reason[3]] == "gate", "it is frozen"
    assert buffers.reason[:3].tolist() == [GO_ON] * 3


def test_what_carries_out_passes_is_prepared_once_and_first(tiny_model: RDT) -> None:
    called: list[object] = []

    class Told(PlainPasses):
        def prepare(self, buffers: Buffers, sizes: Sequence[Size]) -> None:
            called.append((buffers.hidden.shape[0], sizes[-1]))

        def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
            called.append("a pass")
            super().__call__(buffers, bucket)

    backend = LookaheadBackend(tiny_model, 80, 8, Told(tiny_model))
    [result] = run_all(backend, [plain_job(depth=2)], random.Random(0))
    assert result.steps == 2
    assert called == [(80, Size(80, 9)), *["a pass"] * (len(called) - 1)]


def test_a_tick_in_which_all_kinds_of_things_happen_sends_the_device_five_copies(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a launch, and memory pinned for it. A tick with nothing new sends none."""
    sent: list[int] = []

    def counted(values: torch.Tensor, _device: Any) -> torch.Tensor:
        sent.append(len(values))
        return values

    for module in (lookahead, packing, static_batch):
        monkeypatch.setattr(module, "to_device", counted)
    backend, scheduler = backend_of(tiny_model), Scheduler(LIMITS)
    copies = []
    for tick in range(5):
        for depth in (3, 4) if tick == 0 else (5, 1) if tick == 3 else ():  # one has gone, and another goes
            put(scheduler.queue, plain_job(depth=depth))
        sent.clear()
        plan = scheduler.plan(now=0.0)
        scheduler.commit(plan, backend.run(plan), now=0.0)
        copies.append(len(sent))
    assert copies == [3, 0, 1, 5, 2]


def test_padding_takes_the_dead_rows_of_a_bucket_for_a_sequence_without_tokens(tiny_model: RDT) -> None:
    bucket = lay_out(Buffers.of(tiny_model, 64, 9), [5, 7, 4], Size(64, 9))
    heads = torch.randn(3, 64, 2, 8, generator=torch.Generator().manual_seed(0))
    alone = packed_attention(*heads[:, :16], Packing.of([5, 7, 4]))
    torch.testing.assert_close(padded_attention(*heads, bucket)[:16], alone)


def test_closing_up_moves_rows_and_slots_together(tiny_model: RDT) -> None:
    buffers = Buffers.of(tiny_model, 64, 9)
    buffers.hidden[:16] = torch.arange(16.0)[:, None]
    buffers.level[:3] = torch.tensor([0.1, 0.2, 0.3])
    close_up(buffers, [(1, range(5, 12)), (2, range(12, 16))])
    assert buffers.hidden[:11, 0].tolist() == [*range(5, 16)]
    assert buffers.level[:2].tolist() == pytest.approx([0.2, 0.3])


def test_sizes_have_room_for_the_budget_and_the_batch() -> None:
    assert [size.n_rows for size in sizes_up_to(400, 10)] == [64, 96, 128, 192, 256, 384, 400]
    assert sizes_up_to(80, 64)[-1] == Size(80, 65), "as many sequences as may be live"
    assert sizes_up_to(64, 1) == [Size(64, 2)]
    assert [size.n_slots for size in sizes_up_to(400, 30)] == [9, 13, 17, 25, 31, 31, 31]
    assert sizes_up_to(16_384, 512)[-1] == Size(16_384, 513), "attention looks at every slot, taken or not"


@pytest.mark.parametrize("lengths", [[65], [4] * 9], ids=["rows", "slots"])
def test_a_bucket_has_room_for_every_row_and_a_slot_for_every_sequence(tiny_model: RDT, lengths: list[int]) -> None:
    """And one for the dead rows: 64 rows have 9 slots."""
    assert LookaheadBackend(tiny_model, 200, 30)._fitting(lengths) == Size(96, 13)


@pytest.mark.parametrize("changes", [{"stream": True}, {"halting": "settle"}])
def test_what_is_read_after_every_pass_is_not_computed_twice(tiny_model: RDT, changes: dict[str, Any]) -> None:
    backend, scheduler = backend_of(tiny_model), Scheduler(LIMITS)
    job = replace(plain_job(depth=1), **changes)
    put(scheduler.queue, job)
    plan = scheduler.plan(now=0.0)
    [(_, result)] = scheduler.commit(plan, backend.run(plan), now=0.0)
    assert result.steps == 1
    assert backend._sequences == []
    assert backend._launched is None
