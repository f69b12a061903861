"""One of the batches computed side by side: a backend, the thread it computes in, and who is live there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.engine.backend import Backend
from service.engine.scheduler import Scheduler
from service.engine.types import Admission, Job, Outcome, Plan

Value = TypeVar("Value")

THREAD_NAME = "engine"
"""What the names of computing threads begin with."""

POLLS = 4
"""A tick is polled so many times in `stuck_seconds`: if the whole process has stood still, that uses up only one."""


class Stuck(Exception):
    """The backend has not come back. No thread can be ended from outside, so the process has to."""


class Replica:
    """Its thread does one thing at a time. A tick has `stuck_seconds`; None: any time."""

    def __init__(self, backend: Backend, scheduler: Scheduler, stuck_seconds: float | None = None) -> None:
        self.backend = backend
        self.scheduler = scheduler
        self.work = asyncio.Event()  # something to plan
        self._stuck_seconds = stuck_seconds
        self._stuck = False
        self._doing: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)

    async def run(self, plan: Plan) -> Outcome:
        """Raises what the backend raises, and `Stuck`."""
        return await self._unless_stuck(lambda: self.backend.run(plan))

    async def reset(self) -> None:
        """Raises as `run`."""
        await self._unless_stuck(self.backend.reset)

    async def rehearse(self, jobs: Sequence[Job]) -> None:
        """One pass of each job: ticks until all are reported, which with lookahead takes several."""
        await self._in_thread(lambda: _rehearse(self.backend, jobs))  # not watched: capturing graphs may take long

    async def stop(self) -> None:
        """End the thread, after at most one pass; one that is stuck stays behind."""
        if self._doing is not None and not self._doing.done() and not self._stuck:
            last = asyncio.wrap_future(self._doing)
            await asyncio.wait({last}, timeout=self._stuck_seconds)
            self._stuck = not last.done()
            if last.done() and not last.cancelled():
                last.exception()  # whoever asked for it has it, or has left
        await asyncio.to_thread(self._thread.shutdown, wait=not self._stuck)

    async def _unless_stuck(self, call: Callable[[], Value]) -> Value:
        """What the call returns in the thread. Raises what it raises, and `Stuck`."""
        doing = self._in_thread(call)
        try:
            for _ in range(POLLS):
                if (await asyncio.wait({doing}, timeout=self._stuck_seconds and self._stuck_seconds / POLLS))[0]:
                    return doing.result()
        finally:
            doing.cancel()  # does nothing once it is done
        self._stuck = True
        raise Stuck(f"a tick has not come back for {self._stuck_seconds:g} s")

    def _in_thread(self, call: Callable[[], Value]) -> asyncio.Future[Value]:
        self._doing = doing = self._thread.submit(call)
        return asyncio.wrap_future(doing)


def _rehearse(backend: Backend, jobs: Sequence[Job]) -> None:
    admitted = tuple(Admission(ticket, job, job.max_steps) for ticket, job in enumerate(jobs))
    n_tokens, live = sum(len(job.tokens) for job in jobs), tuple(range(len(jobs)))
    try:
        while live:
            plan = Plan(admitted, live=live, n_tokens=n_tokens)
            readings = backend.run(plan).readings
            ended = {ticket for ticket, reading in readings.items() if reading.reason is not None}
            admitted, live = (), tuple(ticket for ticket in live if ticket not in ended)
    finally:
        backend.reset()
