from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Job, Plan, Result, Ticket
from service.errors import ResourceExhausted
from tests.service.engine.scripted import ScriptedBackend, put, scripted_job

LIMITS = SchedulerLimits(token_budget=32, max_live=4, max_waiting=1000, max_waiting_tokens=10**6, max_bypass=2)


class Bench:
    """A scheduler and a scripted backend, and what came of every job."""

    def __init__(self, limits: SchedulerLimits = LIMITS) -> None:
        self.scheduler = Scheduler(limits)
        self.backend = ScriptedBackend()
        self.results: dict[Ticket, Result] = {}
        self.expired: list[Ticket] = []
        self.now = 0.0

    def submit(self, job: Job) -> Ticket:
        return put(self.scheduler.queue, job, self.now)

    def tick(self) -> Plan:
        plan = self.scheduler.plan(self.now)
        self.expired += plan.expired
        if not plan.empty:
            for ticket, result in self.scheduler.commit(plan, self.backend.run(plan), self.now):
                assert ticket not in self.results, "a job ended twice"
                self.results[ticket] = result
        self.now += 1.0
        return plan

    def run_dry(self, at_most: int = 10_000) -> None:
        for _ in range(at_most):
            if self.tick().empty and self.scheduler.idle:
                return
        raise AssertionError("the scheduler does not come to an end")


def test_each_sequence_leaves_at_its_own_depth_and_its_place_is_filled_at_once() -> None:
    bench = Bench(replace(LIMITS, max_live=2))
    deep, shallow, next_one = (bench.submit(scripted_job(4, depth)) for depth in (5, 1, 1))
    assert bench.tick().live == (deep, shallow)
    assert bench.tick().live == (deep, next_one)
    assert {shallow, next_one} == set(bench.results)


def test_the_token_budget_bounds_every_tick() -> None:
    bench = Bench()
    for _ in range(5):
        bench.submit(scripted_job(16, depth=2))
    assert bench.tick().n_tokens == 32
    bench.run_dry()
    assert len(bench.results) == 5


def test_a_small_request_passes_a_big_one_only_so_often() -> None:
    bench = Bench(replace(LIMITS, max_bypass=2))
    bench.submit(scripted_job(20, depth=50))
    big = bench.submit(scripted_job(30, depth=1))
    small = [bench.submit(scripted_job(4, depth=1)) for _ in range(4)]
    bench.tick()
    assert set(bench.results) == {small[0], small[1]}
    bench.tick()
    assert set(bench.results) == {small[0], small[1]}, "the third may not pass the big one too"
    bench.run_dry()
    assert bench.results[big].queue_seconds == 50


def test_the_head_of_the_line_is_served_first_when_both_fit() -> None:
    bench = Bench(replace(LIMITS, max_live=1))
    first, second = bench.submit(scripted_job(30, depth=1)), bench.submit(scripted_job(1, depth=1))
    bench.tick()
    assert list(bench.results) == [first]
    bench.tick()
    assert list(bench.results) == [first, second]


@pytest.mark.parametrize(
    ("job", "steps", "reason"),
    [
        (scripted_job(4, depth=3), 3, "gate"),
        (scripted_job(4, depth=9, max_steps=2), 2, "max_steps"),
        (scripted_job(4, depth=9, deadline=3.0), 4, "deadline"),
    ],
)
def test_why_a_sequence_stops(job: Job, steps: int, reason: str) -> None:
    bench = Bench()
    ticket = bench.submit(job)
    bench.run_dry()
    result = bench.results[ticket]
    assert (result.steps, result.reason) == (steps, reason)
    assert result.tokens == [7, 7, 7, 7]
    assert len(result.levels) == steps


def test_a_deadline_that_comes_in_the_queue_ends_the_job_unrun() -> None:
    bench = Bench(replace(LIMITS, max_live=1))
    bench.submit(scripted_job(4, depth=10))
    late = bench.submit(scripted_job(4, depth=1, deadline=2.0))
    bench.run_dry()
    assert bench.expired == [late]
    assert late not in bench.results


def test_a_live_job_whose_caller_left_frees_its_tokens_in_the_next_tick() -> None:
    bench = Bench()
    gone = bench.submit(scripted_job(32, depth=100))
    waits = bench.submit(scripted_job(32, depth=1))
    bench.tick()
    bench.scheduler.cancel(gone)
    plan = bench.tick()
    assert plan.dropped == (gone,)
    assert plan.live == (waits,)


def test_a_waiting_job_whose_caller_left_is_gone_at_once() -> None:
    bench = Bench()
    bench.submit(scripted_job(32, depth=3))
    gone = bench.submit(scripted_job(32, depth=1))
    bench.tick()
    bench.scheduler.cancel(gone)
    assert bench.scheduler.queue.n_queued == 0
    bench.run_dry()
    assert gone not in bench.results


def test_who_leaves_during_the_last_pass_is_finished_all_the_same() -> None:
    bench = Bench()
    ticket = bench.submit(scripted_job(4, depth=1))
    plan = bench.scheduler.plan(bench.now)
    outcome = bench.backend.run(plan)
    bench.scheduler.cancel(ticket)
    assert [ended for ended, _ in bench.scheduler.commit(plan, outcome, bench.now)] == [ticket]
    assert bench.tick().empty, "nothing is left to drop"


def test_a_reading_of_a_sequence_that_was_dropped_meanwhile_is_passed_over() -> None:
    """As a backend tells it that looks ahead."""
    bench = Bench()
    gone, stays = (bench.submit(scripted_job(4, depth=3)) for _ in range(2))
    before = bench.scheduler.plan(bench.now)
    outcome = bench.backend.run(before)
    bench.scheduler.cancel(gone)
    assert bench.scheduler.plan(bench.now).dropped == (gone,)
    assert bench.scheduler.commit(before, outcome, bench.now) == []
    assert (bench.scheduler.depth(gone), bench.scheduler.depth(stays)) == (0, 1)


def test_a_result_tells_how_long_the_job_waited_and_how_long_it_was_computed() -> None:
    bench = Bench(replace(LIMITS, max_live=1))
    bench.now = 3.0
    first, second = (bench.submit(scripted_job(4, depth)) for depth in (2, 3))
    bench.run_dry()
    times = {ticket: (result.queue_seconds, result.compute_seconds) for ticket, result in bench.results.items()}
    assert times == {first: (0.0, 1.0), second: (2.0, 2.0)}, "the last pass takes no time on this bench"


def test_who_had_rows_in_the_vocabulary_is_told_how_long_that_took() -> None:
    bench = Bench()
    deep, shown, shallow = (
        bench.submit(scripted_job(4, depth, stream=stream)) for depth, stream in ((3, False), (2, True), (1, False))
    )
    for _ in range(3):
        plan = bench.scheduler.plan(bench.now)
        outcome = replace(bench.backend.run(plan), decode_seconds=0.25)
        bench.results.update(bench.scheduler.commit(plan, outcome, bench.now))
    assert {ticket: bench.results[ticket].decode_seconds for ticket in (deep, shown, shallow)} == {
        deep: 0.25, shown: 0.5, shallow: 0.25,
    }  # fmt: skip


def test_a_tick_that_was_computed_shows_what_there_is_memory_for() -> None:
    bench = Bench()
    bench.submit(scripted_job(8, depth=3))
    for _ in range(2):
        bench.tick()
        bench.scheduler.budget.shrink(8, bench.now)
        assert bench.scheduler.budget.tokens == 32, "as many were computed before, since the last shortage too"


def test_who_left_is_forgotten_with_a_broken_tick() -> None:
    bench = Bench()
    gone = bench.submit(scripted_job(4, depth=9))
    bench.tick()
    bench.scheduler.cancel(gone)
    assert bench.scheduler.lose_live() == (gone,)
    assert bench.tick().empty


def test_who_left_does_not_begin_anew_with_the_others() -> None:
    bench = Bench()
    gone, stays = (bench.submit(scripted_job(4, depth=2)) for _ in range(2))
    bench.tick()
    bench.scheduler.cancel(gone)
    bench.scheduler.start_over()
    bench.backend.reset()
    plan = bench.tick()
    assert (plan.dropped, plan.live) == ((), (stays,))
    bench.run_dry()
    assert bench.results[stays].steps == 2, "counted from the start"


def test_dropping_all_empties_the_line_now_and_the_batch_with_the_next_plan() -> None:
    bench = Bench(replace(LIMITS, max_live=1))
    live, waiting = (bench.submit(scripted_job(4, depth=9)) for _ in range(2))
    bench.tick()
    assert bench.scheduler.drop_all() == (live, waiting)
    assert bench.scheduler.queue.n_queued == 0
    assert not bench.scheduler.idle
    assert bench.tick().dropped == (live,)
    assert bench.scheduler.idle


def test_a_text_that_there_is_no_memory_for_here_does_not_count_as_passed() -> None:
    """It waits for a batch with more; the line goes on without it."""
    bench = Bench(replace(LIMITS, max_live=1, max_bypass=1))
    large = bench.submit(scripted_job(20, depth=1))
    small = [bench.submit(scripted_job(4, depth=1)) for _ in range(3)]
    bench.scheduler.budget.shrink(20, bench.now)
    for _ in small:
        bench.tick()
    assert list(bench.results) == small
    assert not bench.scheduler.idle, f"{large} waits"


def test_shedding_lowers_the_ceiling_with_the_length_of_the_line_down_to_the_floor() -> None:
    bench = Bench(replace(LIMITS, max_live=1, max_waiting=10, shed_min_steps=3))
    tickets = [bench.submit(scripted_job(1, depth=100, max_steps=13)) for _ in range(10)]
    bench.run_dry()
    ceilings = [bench.results[ticket].max_steps for ticket in tickets]
    assert ceilings == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13], "by what is left waiting: nine to none"
    assert all(bench.results[ticket].steps == ceiling for ticket, ceiling in zip(tickets, ceilings, strict=True))


def test_what_begins_anew_keeps_the_ceiling_it_was_given() -> None:
    bench = Bench(replace(LIMITS, max_live=1, max_waiting=10, shed_min_steps=3))
    first, *others = (bench.submit(scripted_job(1, depth=100, max_steps=13)) for _ in range(10))
    bench.tick()
    for ticket in others:
        bench.scheduler.cancel(ticket)
    bench.scheduler.start_over()
    bench.backend.reset()
    bench.run_dry()
    assert bench.results[first].max_steps == 4, "of when nine were waiting"


def test_shedding_leaves_alone_what_leaves_nobody_waiting() -> None:
    bench = Bench(replace(LIMITS, max_live=2, max_waiting=2, shed_min_steps=2))
    tickets = [bench.submit(scripted_job(1, depth=100, max_steps=20)) for _ in range(2)]
    bench.run_dry()
    assert [bench.results[ticket].max_steps for ticket in tickets] == [20, 20]


def test_shedding_goes_down_to_the_floor() -> None:
    bench = Bench(replace(LIMITS, max_live=1, max_waiting=40, shed_min_steps=3))
    tickets = [bench.submit(scripted_job(1, depth=100, max_steps=20)) for _ in range(40)]
    bench.run_dry()
    assert bench.results[tickets[0]].max_steps == 3


def test_shedding_never_raises_what_was_asked_for() -> None:
    bench = Bench(replace(LIMITS, max_waiting=1, shed_min_steps=8))
    ticket = bench.submit(scripted_job(1, depth=100, max_steps=2))
    bench.run_dry()
    assert bench.results[ticket].max_steps == 2


def test_without_shedding_the_ceiling_is_the_jobs() -> None:
    bench = Bench(replace(LIMITS, max_waiting=1))
    ticket = bench.submit(scripted_job(1, depth=100, max_steps=9))
    bench.run_dry()
    assert bench.results[ticket].max_steps == 9


def test_the_line_is_bounded_in_requests_and_in_tokens() -> None:
    bench = Bench(replace(LIMITS, max_waiting=2, max_waiting_tokens=10))
    bench.submit(scripted_job(4, depth=1))
    with pytest.raises(ResourceExhausted, match="7 more do not fit"):
        bench.submit(scripted_job(7, depth=1))
    bench.submit(scripted_job(4, depth=1))
    with pytest.raises(ResourceExhausted, match="2 requests are waiting"):
        bench.submit(scripted_job(1, depth=1))


def test_a_job_that_can_never_fit_a_tick_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="33 tokens: want at most token_budget = 32"):
        Bench().submit(scripted_job(33, depth=1))


def test_a_broken_tick_loses_what_was_live_and_keeps_the_queue() -> None:
    bench = Bench(replace(LIMITS, max_live=1))
    live, waiting = bench.submit(scripted_job(4, depth=9)), bench.submit(scripted_job(4, depth=1))
    bench.tick()
    assert bench.scheduler.lose_live() == (live,)
    bench.backend.reset()
    bench.run_dry()
    assert set(bench.results) == {waiting}


jobs = st.builds(scripted_job, st.integers(1, 32), st.integers(1, 12), max_steps=st.integers(1, 12), deadline=st.none())


@settings(max_examples=60)
@given(
    st.lists(st.tuples(jobs, st.sampled_from(["run", "cancel", "late"])), max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_job_ends_once_within_budget_whatever_comes(
    arrivals: list[tuple[Job, str]], order: random.Random
) -> None:
    bench = Bench()
    fates: dict[Ticket, str] = {}
    for job, fate in arrivals:
        timed = replace(job, deadline=bench.now + 2.0) if fate == "late" else job
        ticket = bench.submit(timed)
        fates[ticket] = fate
        if order.random() < 0.5:
            assert bench.tick().n_tokens <= LIMITS.token_budget
        if fate == "cancel" and ticket not in bench.results:
            bench.scheduler.cancel(ticket)
            fates[ticket] = "cancelled"
    bench.run_dry()
    ended = [*bench.results, *bench.expired]
    assert len(ended) == len(set(ended))
    for ticket, fate in fates.items():
        if fate != "cancelled":
            assert (ticket in bench.results) != (ticket in bench.expired)
    assert not bench.backend.live


@settings(max_examples=60)
@given(st.lists(jobs, min_size=1, max_size=15), st.randoms(use_true_random=False))
def test_the_outcome_of_a_job_does_not_depend_on_the_order_of_arrival(some: list[Job], order: random.Random) -> None:
    def outcomes(sequence: list[int]) -> dict[int, tuple[int, str]]:
        bench = Bench()
        tickets = {}
        for index in sequence:
            tickets[index] = bench.submit(some[index])
            if order.random() < 0.5:
                bench.tick()
        bench.run_dry()
        return {index: (bench.results[t].steps, bench.results[t].reason) for index, t in tickets.items()}

    shuffled = list(range(len(some)))
    order.shuffle(shuffled)
    assert outcomes(list(range(len(some)))) == outcomes(shuffled)


@settings(max_examples=40)
@given(st.lists(jobs, min_size=1, max_size=25))
def test_nobody_starves_under_a_stream_of_small_requests(stream: list[Job]) -> None:
    """A request of the largest size is admitted once those before it, and a bounded number after it, are done."""
    bench = Bench()
    bench.submit(scripted_job(16, depth=12, max_steps=12))
    bench.tick()
    big = bench.submit(scripted_job(32, depth=1))
    for job in stream:
        bench.submit(replace(job, tokens=[0], masked=[True]))
        bench.tick()
    bench.run_dry()
    assert bench.results[big].queue_seconds <= 12 * (1 + LIMITS.max_bypass)


def test_a_text_longer_than_the_queue_has_tokens_is_taken_when_nobody_waits() -> None:
    """Or it could never be served."""
    bench = Bench(replace(LIMITS, max_waiting_tokens=10))
    ticket = bench.submit(scripted_job(20, depth=1))
    with pytest.raises(ResourceExhausted):
        bench.submit(scripted_job(1, depth=1))
    bench.run_dry()
    assert bench.results[ticket].steps == 1
