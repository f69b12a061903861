"""What the engine expects work to take, and deadlines kept by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.pace import Pace
from service.engine.scheduler import ANSWER_SECONDS, Scheduler, SchedulerLimits
from service.engine.types import Job, Outcome, Plan, Result
from tests.service.engine.scripted import ScriptedBackend, put, scripted_job

LIMITS = SchedulerLimits(token_budget=1000, max_live=100, max_waiting=1000, max_waiting_tokens=10**6)


def test_nothing_known_and_nothing_to_do_take_no_time() -> None:
    pace = Pace()
    assert pace.expected(100) == 0.0
    pace.took(0, 5.0)
    assert pace.expected(100) == 0.0
    pace.took(1, 1.0)
    assert [pace.expected(amount) for amount in (0, 1)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("amount", "seconds"),
    [(16, 1.0), (20, 1.25), (100, 3.0), (127, 3.81), (40, 2.5), (8, 0.5), (300, 9.0)],
    ids=["known", "of that order", "known", "of that order", "of none", "less than ever", "more than ever"],
)
def test_what_is_not_known_is_in_proportion_to_what_is(amount: int, seconds: float) -> None:
    pace = Pace()
    pace.took(100, 3.0)
    pace.took(16, 1.0)
    assert pace.expected(amount) == pytest.approx(seconds)


def test_a_slow_turn_is_believed_at_once_and_forgotten_by_halves() -> None:
    pace = Pace()
    for seconds in (1.0, 9.0):
        pace.took(64, seconds)
        assert pace.expected(64) == seconds
    pace.took(64, 1.0)
    assert pace.expected(64) == 5.0
    pace.took(96, 1.5)
    assert pace.expected(64) == 3.0, "it is of the same order: half of 7.5 and 1.5"


def test_a_turn_that_stood_still_says_nothing_of_lighter_ones() -> None:
    pace = Pace()
    pace.took(40, 0.01)
    pace.took(300, 60.0)
    assert pace.expected(60) == pytest.approx(0.015)


class Machine:
    """A backend whose passes and decoding take simulated time in proportion, and a scheduler that learns it."""

    PASS, DECODE = 0.01, 0.02  # seconds a token, a row

    def __init__(self) -> None:
        self.scheduler, self.backend, self.now = Scheduler(LIMITS), ScriptedBackend(), 0.0

    def submit(self, job: Job) -> None:
        put(self.scheduler.queue, job, self.now)

    def run(self, *jobs: Job) -> dict[float, Result]:
        """All of them at once until the last is done: results by the time of the answer."""
        for job in jobs:
            self.submit(job)
        results: dict[float, Result] = {}
        while not self.scheduler.idle:
            for result in self.tick():
                results[self.now] = result
        return results

    def tick(self) -> list[Result]:
        plan = self.scheduler.plan(self.now)
        outcome = self._cost(plan, self.backend.run(plan))
        return [result for _, result in self.scheduler.commit(plan, outcome, self.now)]

    def _cost(self, plan: Plan, outcome: Outcome) -> Outcome:
        decoding = self.DECODE * outcome.n_decoded
        self.now += self.PASS * plan.n_tokens + decoding
        return Outcome(outcome.readings, outcome.n_decoded, decoding)


def endless(n_tokens: int, deadline: float) -> Job:
    return scripted_job(n_tokens, depth=100, deadline=deadline)


@pytest.fixture
def machine() -> Machine:
    """It has seen a tick of 50 tokens that decoded all of them."""
    machine = Machine()
    machine.run(scripted_job(50, depth=1))
    return machine


@pytest.mark.parametrize(
    ("seconds", "steps"), [(2.5, 2), (2.1, 2), (2.0 + ANSWER_SECONDS / 2, 1), (1.9, 1)], ids="{}".format
)
def test_the_time_to_decode_and_to_answer_is_kept_free(machine: Machine, seconds: float, steps: int) -> None:
    deadline = machine.now + seconds  # two passes and all rows take 2.0
    [(answered, result)] = machine.run(endless(50, deadline)).items()
    assert (result.reason, result.steps) == ("deadline", steps)
    assert answered <= deadline


def test_after_a_heavy_tick_a_light_one_is_not_cut_short(machine: Machine) -> None:
    deadline = machine.now + 2.0
    [(answered, result)] = machine.run(endless(2, deadline)).items()
    assert result.steps > 90
    assert answered <= deadline


def test_with_a_heavy_newcomer_the_tick_at_hand_counts(machine: Machine) -> None:
    machine.run(endless(2, machine.now + 1.0))  # light ticks are known too
    began = machine.now
    machine.submit(scripted_job(100, depth=100, max_steps=3))
    answered, _ = next(iter(machine.run(endless(2, began + 2.5)).items()))
    assert answered <= began + 2.5


@pytest.mark.parametrize("apart", [0.0, 0.1], ids=["one deadline", "deadlines that follow each other"])
def test_many_that_end_together_are_decoded_in_time(machine: Machine, apart: float) -> None:
    jobs = [endless(20, machine.now + 20.0 + apart * i) for i in range(10)]
    results = machine.run(*jobs)
    assert {result.reason for result in results.values()} == {"deadline"}
    assert max(results) <= min(job.deadline or 0.0 for job in jobs)


def test_what_is_due_much_later_takes_no_time_from_it(machine: Machine) -> None:
    began = machine.now
    results = machine.run(endless(2, began + 5.0), endless(100, began + 1000.0))
    assert results[min(results)].steps == 4, "4 passes of 102 tokens and 2 rows take 4.1 s"


def test_a_stream_is_decoded_in_every_tick(machine: Machine) -> None:
    deadline = machine.now + 3.9
    machine.submit(scripted_job(50, depth=100, deadline=deadline, stream=True))
    [(answered, result)] = machine.run().items()
    assert (result.steps, answered <= deadline) == (2, True), "1.5 s each"


@pytest.mark.parametrize(("decode_all", "steps"), [(False, 4), (True, 2)], ids=["masked rows", "all rows"])
def test_only_rows_that_will_be_decoded_take_time_from_it(machine: Machine, decode_all: bool, steps: int) -> None:
    deadline = machine.now + 2.1  # four passes and one row take 2.02, two passes and all rows 2.0
    job = endless(50, deadline)
    [(answered, result)] = machine.run(replace(job, masked=[True] + [False] * 49, decode_all=decode_all)).items()
    assert (result.steps, answered <= deadline) == (steps, True)


@pytest.mark.parametrize("due_in", [None, 1000.0], ids=["without a deadline", "with a later one"])
@pytest.mark.parametrize(("max_steps", "passes", "steps"), [(2, 0, 1), (3, 1, 1), (3, 0, 2)])
def test_rows_that_are_sure_to_be_decoded_before_count(
    machine: Machine, max_steps: int, passes: int, steps: int, due_in: float | None
) -> None:
    """Others that have made some passes end in the next tick; or in the one after it, which is time enough."""
    due = None if due_in is None else machine.now + due_in
    for _ in range(2):
        machine.submit(scripted_job(40, depth=100, max_steps=max_steps, deadline=due))
    for _ in range(passes):
        machine.tick()
    # too early for two passes and all that ends then
    deadline = machine.now + 2 * Machine.PASS * 82 + Machine.DECODE * 40
    [result] = [r for r in machine.run(endless(2, deadline)).values() if r.reason == "deadline"]
    assert result.steps == steps
