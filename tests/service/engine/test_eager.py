"""The packed backend against the reference loop: company must not change an answer."""

from __future__ import annotations

import copy
import math
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdt_core import RDT, Packing, State, halting, restore
from rdt_core.precision import Precision, prepare
from service.engine import batch_halting
from service.engine.batch_halting import Terms
from service.engine.eager import Decoded, EagerBackend
from service.engine.lookahead import LookaheadBackend
from service.engine.reference import run_reference
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Admission, Choice, Job, Plan, Result, Ticket
from tests.service.engine.scripted import put

LIMITS = SchedulerLimits(token_budget=80, max_live=8, max_waiting=1000, max_waiting_tokens=10**6)


def random_job(rng: random.Random, vocab_size: int) -> Job:
    length = rng.randint(1, 32)
    share = rng.choice([0.0, 0.2, 0.9])
    return Job(
        tokens=[rng.randrange(vocab_size) for _ in range(length)],
        masked=[rng.random() < share for _ in range(length)],
        max_steps=rng.randint(1, 10),
        threshold=rng.choice([0.0, 0.05, 0.2, 0.3, 0.5, 2.0]),
        halting=rng.choice(["gate", "settle"]),
        top_k=rng.choice([0, 2, 3]),
        decode_all=rng.random() < 0.2,
        stream=rng.random() < 0.2,
    )


def run_all(backend: EagerBackend, jobs: list[Job], rng: random.Random) -> list[Result]:
    """Jobs trickle in while others are live."""
    scheduler = Scheduler(LIMITS)
    results: dict[Ticket, Result] = {}
    tickets = []

    def tick() -> None:
        plan = scheduler.plan(now=0.0)
        if not plan.empty:
            results.update(scheduler.commit(plan, backend.run(plan), now=0.0))

    for job in jobs:
        tickets.append(put(scheduler.queue, job))
        if rng.random() < 0.5:
            tick()
    while not scheduler.idle:
        tick()
    return [results[ticket] for ticket in tickets]


@pytest.mark.parametrize("halting", ["gate", "settle"])
@pytest.mark.parametrize("decode_all", [False, True])
def test_a_job_run_alone_is_the_reference(tiny_model: RDT, halting: str, decode_all: bool) -> None:
    tokens, masked = torch.tensor([2, 40, 4, 41, 4, 3]), torch.tensor([False, False, True, False, True, False])
    options = {"max_steps": 6, "threshold": 0.1, "halting": halting, "top_k": 2, "decode_all": decode_all}
    expected = restore(tiny_model, tokens, masked, **options)  # type: ignore[arg-type] # a table of options
    result = run_reference(tiny_model, Job(tokens.tolist(), masked.tolist(), **options))  # type: ignore[arg-type]
    unmeasured = dict.fromkeys(("queue_seconds", "compute_seconds", "decode_seconds"), 0.0)
    assert vars(result) == {**vars(expected), "max_steps": 6, **unmeasured}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_lengths_depths_thresholds_and_arrivals_answers_as_the_reference_does(
    tiny_model: RDT, seed: int, prepared: bool
) -> None:
    rng = random.Random(seed)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]
    served = prepare(copy.deepcopy(tiny_model)) if prepared else tiny_model
    check_against_the_reference(tiny_model, jobs, run_all(EagerBackend(served), jobs, rng))


def test_so_does_a_mix_in_which_nobody_settles(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked how sure it is of anything."""
    rng = random.Random(3)
    jobs = [replace(random_job(rng, tiny_model.config.vocab_size), halting="gate") for _ in range(60)]
    monkeypatch.delattr(EagerBackend, "_settle")
    check_against_the_reference(tiny_model, jobs, run_all(EagerBackend(tiny_model), jobs, rng))


def check_against_the_reference(model: RDT, jobs: list[Job], results: list[Result]) -> None:
    for job, result in zip(jobs, results, strict=True):
        alone = run_reference(model, job)
        assert result.tokens == alone.tokens
        assert (result.steps, result.reason) == (alone.steps, alone.reason)
        assert (result.rows, result.fixed_at) == (alone.rows, alone.fixed_at)
        assert result.levels == pytest.approx(alone.levels, abs=1e-5)
        assert result.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        for ours, theirs in zip(result.candidates, alone.candidates, strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert [share for _, share in ours] == pytest.approx([share for _, share in theirs], abs=1e-5)


def test_after_a_pass_that_nobody_ends_with_nothing_is_decoded(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = EagerBackend(tiny_model)
    monkeypatch.delattr(EagerBackend, "_decode")
    jobs = [Job([1, 5, 4, 2], [False, False, True, False], n_passes, 0.0, "gate") for n_passes in (3, 4)]
    admitted = tuple(Admission(ticket, job, job.max_steps) for ticket, job in enumerate(jobs))
    for newcomers in (admitted, ()):
        outcome = backend.run(Plan(newcomers, live=(0, 1)))
        assert outcome.n_decoded == 0
        assert [reading.reason for reading in outcome.readings.values()] == [None, None]


def test_reading_what_was_decoded_is_part_of_the_time_it_takes(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card the host waits there for all that it launched."""
    now, choices = 0.0, Decoded.choices

    def slow_choices(*arguments: Any) -> list[Choice]:
        nonlocal now
        now += 0.25
        return choices(*arguments)

    monkeypatch.setattr(Decoded, "choices", slow_choices)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    outcome = EagerBackend(tiny_model).run(plan_of(masked_job(3, max_steps=1)))
    assert (outcome.n_decoded, outcome.decode_seconds) == (3, 0.25)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_rounded_formats_answer_alone_as_in_a_crowd(tiny_model: RDT, precision: Precision) -> None:
    rng = random.Random(0)
    jobs = [random_job(rng, tiny_model.config.vocab_size) for _ in range(60)]
    served = prepare(copy.deepcopy(tiny_model), precision)
    alone = [run_reference(served, job) for job in jobs]
    together = run_all(EagerBackend(served), jobs, rng)
    assert [(r.tokens, r.steps, r.reason) for r in together] == [(r.tokens, r.steps, r.reason) for r in alone]


def test_what_stays_open_adds_up_to_the_reference_to_the_last_digit() -> None:
    """A threshold may be that very level."""
    lengths = list(range(1, 200))
    token_level = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    stays = token_level > 0.3
    alone = zip(token_level.split(lengths), stays.split(lengths), lengths, strict=True)
    others = dict.fromkeys(set(Terms._fields) - {"n_masked", "level"}, torch.zeros(0))  # not looked at
    terms = Terms(n_masked=torch.tensor(lengths), level=torch.ones(len(lengths)), **others)
    together = batch_halting.settled_level(token_level * stays, Packing.of(lengths), terms)
    assert together.tolist() == [halting.settled_level(one[open_], length, []) for one, open_, length in alone]


def plan_of(*jobs: Job, overdue: tuple[int, ...] = (), dropped: tuple[int, ...] = (), known: int = 0) -> Plan:
    """Admits `jobs` as tickets `known`, `known + 1`, ... beside those already there."""
    admitted = tuple(Admission(known + i, job, job.max_steps) for i, job in enumerate(jobs))
    live = tuple(ticket for ticket in range(known + len(jobs)) if ticket not in dropped)
    return Plan(admitted, dropped, frozenset(overdue), live=live)


def masked_job(n_tokens: int, max_steps: int, **options: object) -> Job:
    return Job([5] * n_tokens, [True] * n_tokens, max_steps, **{"threshold": 0.0, "halting": "gate", **options})  # type: ignore[arg-type]


def test_only_open_rows_of_sequences_that_stop_go_through_the_vocabulary(tiny_model: RDT) -> None:
    backend = EagerBackend(tiny_model)
    three = [masked_job(4, 1), masked_job(5, 2), Job([5] * 9, [False] * 8 + [True], 2, 0.0, "gate")]
    assert backend.run(plan_of(*three)).n_decoded == 4
    assert backend.run(Plan(live=(1, 2))).n_decoded == 6


def test_the_last_layer_of_a_last_pass_computes_what_will_be_read(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    original = RDT.forward

    def forward(model: RDT, state: State, packing: Packing, rows: Tensor | None = None) -> State:
        computed.append(None if rows is None else rows.tolist())
        return original(model, state, packing, rows)

    monkeypatch.setattr(RDT, "forward", forward)
    backend = EagerBackend(tiny_model)
    tokens, masked = [5] * 4, [False, True, False, True]
    last, other = Job(tokens, masked, 1, 0.0, "gate"), Job(tokens, masked, 2, 0.0, "gate")
    whole, settling = replace(other, decode_all=True), Job(tokens, masked, 2, 0.0, "settle")
    backend.run(plan_of(last, other, whole, settling))
    assert computed == [[1, 3, *range(4, 16)]]
    assert backend._batch is not None
    (still_open,) = (row for row in (1, 3) if backend._batch.state.masked[8 + row])  # of the one that settles
    backend.run(Plan(live=(1, 2, 3)))
    assert computed[1] == [1, 3, 4, 5, 6, 7, 8 + still_open]
    backend.run(plan_of(other))
    assert computed[2:] == [None]


def test_settling_decodes_each_masked_row_once(tiny_model: RDT) -> None:
    backend = EagerBackend(tiny_model)
    plan = plan_of(masked_job(6, 3, halting="settle"))
    decoded = [backend.run(plan).n_decoded]
    for _ in range(2):
        decoded.append(backend.run(plan_of(known=1)).n_decoded)
    assert decoded == [1, 2, 3]


def test_only_what_may_settle_is_asked_how_sure_it_is(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are open, of sequences that settle, while there is something to choose."""
    asked = []
    original = RDT.token_level

    def token_level(model: RDT, hidden: Tensor, packing: Packing, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return original(model, hidden, packing, rows)

    monkeypatch.setattr(RDT, "token_level", token_level)
    backend = EagerBackend(tiny_model)
    settling = Job([5] * 4, [True, False, True, True], 3, 0.0, "settle")
    backend.run(plan_of(masked_job(4, 3), settling))
    assert asked == [[4, 6, 7]]
    backend.run(plan_of(known=2))
    assert len(asked[1]) == 2
    backend.run(plan_of(known=2))
    assert len(asked) == 2


def test_an_overdue_sequence_is_decoded_after_one_pass(tiny_model: RDT) -> None:
    (reading,) = EagerBackend(tiny_model).run(plan_of(masked_job(3, 9), overdue=(0,))).readings.values()
    assert reading.reason == "deadline"
    assert [choice.row for choice in reading.chosen] == [0, 1, 2]


def test_a_streamed_job_shows_its_best_guesses_before_the_end(tiny_model: RDT) -> None:
    backend = EagerBackend(tiny_model)
    (first,) = backend.run(plan_of(masked_job(3, 2, stream=True))).readings.values()
    (last,) = backend.run(plan_of(known=1)).readings.values()
    assert ([c.row for c in first.guesses], first.chosen) == ([0, 1, 2], [])
    assert (last.guesses, [c.row for c in last.chosen]) == ([], [0, 1, 2])


def test_dropped_sequences_leave_the_batch(tiny_model: RDT) -> None:
    backend = EagerBackend(tiny_model)
    backend.run(plan_of(masked_job(3, 9), masked_job(4, 9)))
    assert len(backend.run(plan_of(known=2, dropped=(0,))).readings) == 1
    assert backend.run(Plan(dropped=(1,))).readings == {}
    assert len(backend.run(plan_of(masked_job(2, 9))).readings) == 1


def test_after_a_reset_nothing_is_left(tiny_model: RDT) -> None:
    backend = EagerBackend(tiny_model)
    backend.run(plan_of(masked_job(3, 9)))
    backend.reset()
    assert len(backend.run(plan_of(masked_job(2, 9))).readings) == 1


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_level_that_equals_the_threshold_is_not_below_it(tiny_model: RDT, tenths: int) -> None:
    """Of sure rows and of unsure ones alike: the level is then the share of rows still open, to the last bit."""
    model = copy.deepcopy(tiny_model)
    model.gate.token.bias.data.fill_(100.0)
    job = Job([4] * 10, [True] * 10, max_steps=10, threshold=tenths / 10, halting="settle")
    (result,) = run_all(EagerBackend(model), [job], random.Random(0))
    alone = run_reference(model, job)
    assert (result.steps, result.reason, result.levels) == (alone.steps, alone.reason, alone.levels)


@pytest.mark.parametrize("kind", [EagerBackend, LookaheadBackend])
def test_a_threshold_is_not_rounded_to_the_digits_of_a_level(
    tiny_model: RDT, kind: type[EagerBackend | LookaheadBackend]
) -> None:
    def answer(threshold: float) -> Result:
        backend = EagerBackend(tiny_model) if kind is EagerBackend else LookaheadBackend(tiny_model, 80, 8)
        (result,) = run_all(backend, [masked_job(4, 9, threshold=threshold)], random.Random(0))
        return result

    second = answer(0.0).levels[1]
    assert [answer(threshold).steps for threshold in (second, math.nextafter(second, 1))] == [3, 2]


def test_token_levels_that_are_no_numbers_keep_the_pace(tiny_model: RDT) -> None:
    model = copy.deepcopy(tiny_model)
    model.gate.token.weight.data.fill_(math.nan)
    masked = [False, True, True, False, True, True]
    job = Job([4] * 6, masked, max_steps=4, threshold=0.0, halting="settle")
    (result,) = run_all(EagerBackend(model), [job], random.Random(0))
    assert sorted(result.fixed_at) == [1, 2, 3, 4]
    assert result.fixed_at == run_reference(model, job).fixed_at
