"""A backend without a model: a sequence's level is 1/(passes + 1), so its threshold says after how many it halts."""

from __future__ import annotations

import asyncio
import threading

from rdt_core.halting import halt_reason
from service.engine.protocol import Engine, OnReading
from service.engine.scheduler import JobQueue
from service.engine.types import Choice, Job, Outcome, Plan, Reading, Result, Ticket


def scripted_job(
    n_tokens: int, depth: int, *, max_steps: int = 100, deadline: float | None = None, stream: bool = False
) -> Job:
    """Halts by the gate after `depth` passes."""
    threshold = 1.0 / (depth + 1) + 1e-9
    return Job([0] * n_tokens, [True] * n_tokens, max_steps, threshold, "gate", deadline=deadline, stream=stream)


async def submit(engine: Engine, job: Job, on_reading: OnReading | None = None) -> Result:
    with engine.reserve() as place:
        return await engine.submit(job, place, on_reading)


async def until_ready(engine: Engine) -> None:
    async with asyncio.timeout(5):
        while not engine.ready:
            await asyncio.sleep(0.001)


def put(queue: JobQueue, job: Job, now: float = 0.0) -> Ticket:
    with queue.reserve() as place:
        return queue.join(job, place, now)


class ScriptedBackend:
    """Keeps the books a real backend keeps, and checks that every plan fits them."""

    ticks_late = 0

    def __init__(self, token: int = 7) -> None:
        self.token = token
        self.live: dict[Ticket, tuple[Job, int, int]] = {}  # job, ceiling, passes made
        self.ticks: list[Plan] = []
        self.errors: list[Exception] = []  # raised by the next ticks
        self.resets = 0

    def run(self, plan: Plan) -> Outcome:
        self.ticks.append(plan)
        if self.errors:
            raise self.errors.pop(0)
        for ticket in plan.dropped:
            del self.live[ticket]
        for admission in plan.admitted:
            self.live[admission.ticket] = (admission.job, admission.ceiling, 0)
        assert tuple(self.live) == plan.live
        assert plan.n_tokens == sum(len(job.tokens) for job, _, _ in self.live.values())
        readings = {ticket: self._read(ticket, ticket in plan.overdue) for ticket in plan.live}
        return Outcome(readings, n_decoded=sum(len(r.chosen) + len(r.guesses) for r in readings.values()))

    def reset(self) -> None:
        self.resets += 1
        self.live.clear()

    def _read(self, ticket: Ticket, overdue: bool) -> Reading:
        job, ceiling, step = self.live[ticket]
        step += 1
        level = 1.0 / (step + 1)
        reason = halt_reason(
            level=level, threshold=job.threshold, step=step, max_steps=ceiling, all_settled=False, out_of_time=overdue
        )
        self.live[ticket] = (job, ceiling, step)
        due = [row for row, masked in enumerate(job.masked) if masked or job.decode_all]
        rows = [Choice(row, self.token, 0.5, []) for row in due]
        if reason is None:
            return Reading(level, None, [], rows if job.stream else [])
        del self.live[ticket]
        return Reading(level, reason, rows, [])


class HeldBackend(ScriptedBackend):
    """Stands still in the worker thread, before each tick, until it is let go."""

    TIMEOUT_SECONDS = 5.0

    def __init__(self) -> None:
        super().__init__()
        self._started = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def run(self, plan: Plan) -> Outcome:
        self._started.release()
        assert self._go.acquire(timeout=self.TIMEOUT_SECONDS), "nobody let the tick go"
        return super().run(plan)

    def wait_until_started(self) -> None:
        assert self._started.acquire(timeout=self.TIMEOUT_SECONDS), "no tick was started"

    def let_go(self, n_ticks: int = 1) -> None:
        for _ in range(n_ticks):
            self._go.release()
