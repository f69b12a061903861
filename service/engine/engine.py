"""Depth-wise continuous batching: the loop that every request goes round until it is done.

    submit -> Scheduler -> plan -> Backend.run (worker thread) -> commit -> the caller's future

All bookkeeping lives on one event loop, so there are no locks; the worker threads see plans and give
outcomes. A tick is one pass of everything live in one replica; replicas tick on their own and admit from
one line, each no more than its share.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import Context
from typing import Protocol

from service.engine.backend import Backend
from service.engine.queue import Place
from service.engine.scheduler import Line, Scheduler, SchedulerLimits
from service.engine.types import Admission, Job, Outcome, Plan, Reading, Result, Ticket
from service.errors import DeadlineExceeded, Internal, ServiceError, Unavailable

log = logging.getLogger(__name__)

Clock = Callable[[], float]
OnReading = Callable[[Reading], None]
OnTick = Callable[[float, Plan, Outcome], None]  # seconds, what was planned, what was done

FATAL_WINDOW_SECONDS = 60.0
"""A second broken tick within this time ends the process: whatever is wrong, a restart is the better cure."""

RETIRING_TURNS = 16
"""Between taking an engine to submit to and submitting to it lie at most the starts of two or three tasks."""


class Engine(Protocol):
    """What the use case needs. Every submitted job ends exactly once: answered, refused, cancelled or failed."""

    @property
    def ready(self) -> bool:
        """Takes new work."""

    @property
    def waiting(self) -> int:
        """Requests queued, or being prepared in a reserved place."""

    @property
    def live(self) -> int:
        """Jobs being computed."""

    def reserve(self) -> AbstractContextManager[Place]:
        """A place in the queue, to be taken before tokenising; freed on leaving the block unless used.

        Raises `ResourceExhausted` when the queue is full, `Unavailable` when no new work is taken.
        """

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        """Wait for the job to be computed; `on_reading` sees every pass. Cancelling the wait takes the job out.

        Raises `ResourceExhausted` when its tokens do not fit in the queue, `DeadlineExceeded` when the
        deadline came before the first pass (after it, what is there is the result), `Unavailable` when
        the engine stops first, `Internal` when the computation failed.
        """

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, finish what there is, and fail what is left after the grace period."""


class _Caller:
    """Who waits for a ticket."""

    def __init__(self, on_reading: OnReading | None) -> None:
        self.answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.on_reading = on_reading

    def fail(self, error: ServiceError) -> None:
        if not self.answer.done():  # a caller who left has cancelled it
            self.answer.set_exception(error)


class _Replica:
    """A backend, the thread it computes in, and who is live there."""

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        self.backend = backend
        self.scheduler = scheduler
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.work = asyncio.Event()  # something to plan
        self.tick_seconds = 0.0  # of the last tick: a guess at the next


class BatchingEngine:
    """Sequences of any depth share every pass. Lives on the event loop that called `start`.

    `limits` bound the one line and the batch of each backend.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        limits: SchedulerLimits,
        clock: Clock = time.monotonic,
        on_tick: OnTick | None = None,
        on_broken_tick: Callable[[], None] | None = None,
    ) -> None:
        self._line = Line(limits)
        self._replicas = [_Replica(backend, Scheduler(limits, self._line)) for backend in backends]
        self._clock = clock
        self._on_tick = on_tick
        self._on_broken_tick = on_broken_tick
        self._callers: dict[Ticket, _Caller] = {}
        self._idle = asyncio.Event()  # nothing waiting, nothing live
        self._accepting = self._broken = False
        self._broke_at = float("-inf")
        self._loops: list[asyncio.Task[None]] = []
        self.failed = asyncio.Event()
        """Set when the engine gave up: the process should end."""

    @property
    def ready(self) -> bool:
        return self._accepting and not self._broken

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def waiting_tokens(self) -> int:
        return self._line.n_tokens

    @property
    def live(self) -> int:
        return sum(replica.scheduler.n_live for replica in self._replicas)

    async def warm(self, jobs: Sequence[Job]) -> None:
        """Before `start`: one pass of each job on every replica. Nothing of it is counted, and no bound applies."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(r.worker, _rehearse, r.backend, jobs) for r in self._replicas))

    async def start(self) -> None:
        self._accepting = True
        self._idle.set()
        self._loops = [
            asyncio.create_task(self._run(replica), name="engine", context=Context()) for replica in self._replicas
        ]  # in no caller's context: after a reload its log lines would bear the id of the request that asked for it
        for loop in self._loops:
            loop.add_done_callback(self._loop_ended)

    def reserve(self) -> AbstractContextManager[Place]:
        self._check_ready()
        return self._line.reserve()

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        self._check_ready()
        ticket = self._replicas[0].scheduler.submit(job, place, self._clock())
        caller = self._callers[ticket] = _Caller(on_reading)
        timer = None if job.deadline is None else self._at(job.deadline, self._expire, ticket)
        self._idle.clear()
        self._wake()
        try:
            return await caller.answer
        finally:
            if timer is not None:
                timer.cancel()
            if self._callers.pop(ticket, None) is not None:  # left before the end
                for replica in self._replicas:
                    replica.scheduler.cancel(ticket)
                self._wake()

    async def drain(self, grace_seconds: float) -> None:
        self._accepting = False
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("grace period of %g s is over: %d live, %d waiting", grace_seconds, self.live, self.waiting)
            self._drop_all(_shut_down)

    async def retire(self) -> None:
        """End once there is nothing left to do: another engine takes the work that comes from now on.

        Callers who have just been sent here still are a few turns of the event loop away, so the door stays open.
        """
        for _ in range(RETIRING_TURNS):
            await asyncio.sleep(0)
        await self._idle.wait()
        await self.stop()

    async def stop(self) -> None:
        """Fail whatever is left and end the worker."""
        self._accepting = False
        self._drop_all(_shut_down)
        for loop in self._loops:
            loop.cancel()
        self._loops.clear()  # they hold this engine, and it them
        for replica in self._replicas:
            await asyncio.to_thread(replica.worker.shutdown)  # at most one pass

    async def _run(self, replica: _Replica) -> None:
        """The engine: plan, run, commit, for ever."""
        while True:
            plan = replica.scheduler.plan(self._clock(), replica.tick_seconds, self._share)
            self._fail(plan.expired, _too_late)
            if plan.empty:
                if self.live == 0 and self._line.n_queued == 0:
                    self._idle.set()
                await replica.work.wait()
                replica.work.clear()
                continue
            try:
                outcome = await self._tick(replica, plan)
                for ticket, reading in zip(plan.live, outcome.readings, strict=True):
                    self._show(ticket, reading)
                for ticket, result in replica.scheduler.commit(plan, outcome, self._clock()):
                    self._answer(ticket, result)
            except Exception as error:
                await self._recover(replica, error)

    async def _tick(self, replica: _Replica, plan: Plan) -> Outcome:
        began = self._clock()
        outcome = await asyncio.get_running_loop().run_in_executor(replica.worker, replica.backend.run, plan)
        replica.tick_seconds = self._clock() - began
        if self._on_tick is not None:
            self._on_tick(replica.tick_seconds, plan, outcome)
        return outcome

    @property
    def _share(self) -> float:
        """Packed tokens of each replica if all there are were spread evenly."""
        live = sum(replica.scheduler.live_tokens for replica in self._replicas)
        return (live + self._line.n_tokens) / len(self._replicas)

    def _wake(self) -> None:
        for replica in self._replicas:
            replica.work.set()

    def _drop_all(self, make_error: Callable[[], ServiceError]) -> None:
        for replica in self._replicas:
            self._fail(replica.scheduler.drop_all(), make_error)

    async def _recover(self, replica: _Replica, error: Exception) -> None:
        """A tick broke: its jobs fail, the backend starts afresh. Twice in a minute, and the engine gives up."""
        log.error("a tick failed with %d sequences live", replica.scheduler.n_live, exc_info=error)
        self._broken = True
        if self._on_broken_tick is not None:
            self._on_broken_tick()
        message = "the model failed while this request was live; the server has logged why"
        self._fail(replica.scheduler.lose_live(), lambda: Internal(message))
        now = self._clock()
        gives_up, self._broke_at = now - self._broke_at < FATAL_WINDOW_SECONDS, now
        try:
            await asyncio.get_running_loop().run_in_executor(replica.worker, replica.backend.reset)
        except Exception:
            log.exception("the backend cannot be restarted")
            gives_up = True
        if gives_up:
            self._give_up()
        else:
            self._broken = False

    def _give_up(self) -> None:
        self._broken = True
        self._drop_all(lambda: Unavailable("the engine has failed", "failed"))
        self.failed.set()

    def _loop_ended(self, loop: asyncio.Task[None]) -> None:
        """The loop ends when it is cancelled. Any other end is a mistake of ours, and nobody may hang on it."""
        if not loop.cancelled() and (error := loop.exception()) is not None:
            log.critical("the engine's loop broke", exc_info=error)
            self._give_up()

    def _show(self, ticket: Ticket, reading: Reading) -> None:
        caller = self._callers.get(ticket)
        if caller is not None and caller.on_reading is not None:
            caller.on_reading(reading)

    def _answer(self, ticket: Ticket, result: Result) -> None:
        caller = self._callers.pop(ticket, None)
        if caller is not None and not caller.answer.done():
            caller.answer.set_result(result)

    def _fail(self, tickets: Iterable[Ticket], make_error: Callable[[], ServiceError]) -> None:
        for ticket in tickets:
            caller = self._callers.pop(ticket, None)
            if caller is not None:
                caller.fail(make_error())

    def _expire(self, ticket: Ticket) -> None:
        """The deadline came. In the line it ends the job now; a live job is answered at the end of its pass."""
        if self._line.withdraw(ticket):
            self._fail([ticket], _too_late)

    def _at(self, deadline: float, call: Callable[[Ticket], None], ticket: Ticket) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), call, ticket)

    def _check_ready(self) -> None:
        if self._broken:
            raise Unavailable("the engine has failed and is restarting", "failed")
        if not self._accepting:
            raise Unavailable("the server is shutting down and takes no new work", "draining")


def _rehearse(backend: Backend, jobs: Sequence[Job]) -> None:
    for job in jobs:
        backend.run(Plan((Admission(0, job, ceiling=1),), (), frozenset(), (), live=(0,), n_tokens=len(job.tokens)))
    backend.reset()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the time was over before the first pass")


def _shut_down() -> Unavailable:
    return Unavailable("the server shut down before this request was finished", "draining")
