"""Depth-wise continuous batching: the loop that every request goes through until it is done.

    submit -> Scheduler -> plan -> Backend.run (worker thread) -> commit -> the caller's future

All bookkeeping is done on one event loop, so there are no locks. The worker threads receive plans and return
outcomes. A tick is one pass over everything live in one replica. Replicas tick independently and admit from
one common queue, each no more than its share.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from dataclasses import replace

from service.engine.backend import Backend, OutOfMemory
from service.engine.callers import Callers
from service.engine.protocol import Clock, OnReading, Watcher
from service.engine.queue import Place
from service.engine.replica import Replica, Stuck
from service.engine.scheduler import JobQueue, Scheduler, SchedulerLimits
from service.engine.types import Job, Outcome, Plan, Result, Ticket
from service.errors import DeadlineExceeded, Internal, ResourceExhausted, ServiceError, Unavailable

log = logging.getLogger(__name__)

FATAL_WINDOW_SECONDS = 60.0
"""A second broken tick within this time ends the process, for its supervisor to restart."""

SHORTAGE_SECONDS = 0.1
"""Pause before another try when a tick has run out of memory twice: whatever else holds it may give it back."""

SHORTEST_TEXT = 3  # tokens: [CLS], something, [SEP]


class BatchingEngine:
    """Sequences of any depth share every pass. Lives on the event loop that called `start`.

    `limits` bound the one queue and the batch of each backend. A tick that has not come back after `stuck_seconds` ends
    the engine; None: it may take any time.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        limits: SchedulerLimits,
        clock: Clock = time.monotonic,
        watcher: Watcher | None = None,
        stuck_seconds: float | None = None,
    ) -> None:
        self._limits = limits
        self._queue = JobQueue(limits)
        self._replicas = [Replica(backend, Scheduler(limits, self._queue), stuck_seconds) for backend in backends]
        self._clock = clock
        self._watcher = watcher
        self._callers = Callers()
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
        """Requests queued, or being prepared in a reserved place."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        return self._queue.n_tokens

    @property
    def live(self) -> int:
        """Jobs being computed."""
        return sum(replica.scheduler.n_live for replica in self._replicas)

    @property
    def n_replicas(self) -> int:
        return len(self._replicas)

    @property
    def largest_tick(self) -> int:
        """Tokens of the longest text that some replica has memory for."""
        return max(replica.scheduler.budget.tokens for replica in self._replicas)

    @property
    def bounds(self) -> SchedulerLimits:
        """The limits after warming, when a shortage of memory may have halved the budget of a tick."""
        return replace(self._limits, token_budget=self.largest_tick)

    async def warm(self, ticks: Sequence[Sequence[Job]], alone: bool = True) -> None:
        """Before `start`: run each of these ticks once on every replica. Nothing is counted, and no bound applies.

        A tick that there is no memory for halves the budget (see `largest_tick`), so the largest should come first. The
        budget stays halved if this engine was `alone` on its devices; if not, it may grow again later.
        """
        await asyncio.gather(*(self._warm(replica, ticks, alone) for replica in self._replicas))

    async def _warm(self, replica: Replica, ticks: Sequence[Sequence[Job]], alone: bool) -> None:
        for jobs in ticks:
            n_tokens = sum(len(job.tokens) for job in jobs)
            try:
                await replica.rehearse(jobs)
            except OutOfMemory as error:
                self._shrink(replica, n_tokens, error)
            else:
                replica.scheduler.budget.worked(n_tokens)
        replica.scheduler.budget.warmed(alone)

    async def start(self) -> None:
        self._accepting = True
        self._idle.set()
        self._loops = [
            asyncio.create_task(self._run(replica), name="engine", context=Context()) for replica in self._replicas
        ]  # in an empty context: after a reload, log lines would bear the id of the request that asked for it
        for loop in self._loops:
            loop.add_done_callback(self._loop_ended)

    def reserve(self) -> AbstractContextManager[Place]:
        self._check_ready()
        return self._queue.reserve()

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        self._check_ready()
        if self.largest_tick < len(job.tokens) <= self._limits.token_budget:
            for replica in self._replicas:
                replica.scheduler.budget.grow(self._clock())  # budgets grow in `plan`, which idle replicas do not call
            if self.largest_tick < len(job.tokens):
                raise _no_memory(self.largest_tick)
        ticket = self._queue.join(job, place, self._clock())
        answer = self._callers.join(ticket, on_reading)
        timer = None if job.deadline is None else self._expire_at(job.deadline, ticket)
        self._idle.clear()
        self._wake()
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()
            if self._callers.leave(ticket):
                for replica in self._replicas:
                    replica.scheduler.cancel(ticket)
            del answer  # an error in it leads back here by its traceback, and with it all of the request would stay

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, finish what there is, and fail what is left after the grace period."""
        self._accepting = False
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("grace period of %g s is over: %d live, %d waiting", grace_seconds, self.live, self.waiting)
            self._drop_all(Unavailable.shut_down)

    async def retire(self) -> None:
        """Stop once all work is done. New work goes to another engine by then."""
        await self._idle.wait()
        await self.stop()

    async def stop(self) -> None:
        """Fail whatever is left and end the threads."""
        self._accepting = False
        self._drop_all(Unavailable.shut_down)
        for loop in self._loops:
            loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops)  # the threads' ends may take no turn of the event loop
        self._loops.clear()  # breaks the reference cycle between them and this engine
        for replica in self._replicas:
            await replica.stop()

    async def _run(self, replica: Replica) -> None:
        """The engine: plan, run, commit, for ever."""
        while True:
            plan = replica.scheduler.plan(self._clock(), self._share, replica.backend.ticks_late)
            self._callers.fail(plan.expired, _too_late)
            if plan.empty:
                if self.live == 0 and self._queue.n_queued == 0:
                    self._idle.set()
                await replica.work.wait()
                replica.work.clear()
                continue
            try:
                outcome = await self._tick(replica, plan)
                for ticket, reading in outcome.readings.items():
                    self._callers.show(ticket, reading, replica.scheduler.depth(ticket) + 1)
                for ticket, result in replica.scheduler.commit(plan, outcome, self._clock()):
                    self._callers.answer(ticket, result)
            except OutOfMemory as error:
                await self._make_room(replica, plan, error)
            except Stuck:
                raise  # the end of this loop, and of the engine
            except Exception as error:
                await self._recover(replica, error)

    async def _tick(self, replica: Replica, plan: Plan) -> Outcome:
        outcome = await replica.run(plan)
        if self._watcher is not None and plan.live:  # else it only took out those whose callers have left
            self._watcher.ticked(self._clock() - plan.made_at, plan, outcome)
        return outcome

    @property
    def _share(self) -> float:
        """Packed tokens of each batch if all, live and waiting, were spread evenly over the replicas with room."""
        schedulers = [replica.scheduler for replica in self._replicas]
        takers = [one for one in schedulers if one.n_live < self._limits.max_live] or schedulers
        if len({one.budget.tokens for one in takers}) > 1:  # some are short of memory
            shortest = min((entry.n_tokens for entry in self._queue), default=0)
            takers = [one for one in takers if one.budget.tokens >= shortest] or takers
        return (sum(one.live_tokens for one in takers) + self._queue.n_tokens) / len(takers)

    def _wake(self) -> None:
        for replica in self._replicas:
            replica.work.set()

    def _drop_all(self, make_error: Callable[[], ServiceError]) -> None:
        for replica in self._replicas:
            self._callers.fail(replica.scheduler.drop_all(), make_error)

    async def _make_room(self, replica: Replica, plan: Plan, error: OutOfMemory) -> None:
        """After a shortage of memory: smaller ticks, or another try. Only texts too long for any replica fail."""
        if self._watcher is not None:
            self._watcher.memory_ran_out()
        # Short twice in a row, or for the same jobs: their passes may succeed, and what follows the last one may not.
        again = replica.scheduler.budget.short or replica.scheduler.has_begun_anew
        self._shrink(replica, plan.n_tokens, error, again)
        await replica.reset()
        if again:
            await asyncio.sleep(SHORTAGE_SECONDS)
        largest = self.largest_tick
        too_long = [entry.ticket for entry in self._queue if entry.n_tokens > largest]
        for ticket in too_long:
            self._queue.withdraw(ticket)
        self._callers.fail(too_long, lambda: _no_memory(largest))
        if largest < SHORTEST_TEXT:
            log.critical("there is no memory for any text")
            self._give_up()
        self._wake()

    def _shrink(self, replica: Replica, n_tokens: int, error: OutOfMemory, again: bool = False) -> None:
        budget = replica.scheduler.budget
        budget.shrink(n_tokens, self._clock(), again)
        replica.scheduler.start_over()
        said = str(error)  # logging the error itself would keep the tick's tensors
        log.warning("no memory for a tick of %d tokens, %d at the most from now on: %s", n_tokens, budget.tokens, said)

    async def _recover(self, replica: Replica, error: Exception) -> None:
        """A tick broke: its jobs fail, the backend starts afresh. Twice in a minute, and the engine gives up."""
        log.error("a tick failed with %d sequences live", replica.scheduler.n_live, exc_info=error)
        self._broken = True
        if self._watcher is not None:
            self._watcher.tick_broke()
        message = "the model failed while this request was live; the server has logged why"
        self._callers.fail(replica.scheduler.lose_live(), lambda: Internal(message))
        now = self._clock()
        gives_up, self._broke_at = now - self._broke_at < FATAL_WINDOW_SECONDS, now
        await replica.reset()  # if it cannot, this loop ends, and the engine gives up too
        if gives_up:
            self._give_up()
        elif not self.failed.is_set():  # by another replica
            self._broken = False

    def _give_up(self) -> None:
        self._broken = True
        self._drop_all(lambda: Unavailable("the engine has failed", "failed"))
        self._idle.set()  # there may be no loop left to set it
        self.failed.set()

    def _loop_ended(self, loop: asyncio.Task[None]) -> None:
        """A loop should end only by being cancelled. After a stuck tick or a defect, fail everybody who waits."""
        if not loop.cancelled() and (error := loop.exception()) is not None:
            log.critical("the engine's loop broke", exc_info=error)
            self._give_up()

    def _expire(self, ticket: Ticket) -> None:
        """The deadline has come. A queued job fails now; a live one is answered at the end of its pass."""
        if self._queue.withdraw(ticket):
            self._callers.fail([ticket], _too_late)

    def _expire_at(self, deadline: float, ticket: Ticket) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._expire, ticket)

    def _check_ready(self) -> None:
        if self._broken:
            raise Unavailable.restarting()
        if not self._accepting:
            raise Unavailable.draining()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed while the request was in the queue")


def _no_memory(n_tokens: int) -> ResourceExhausted:
    return ResourceExhausted(f"memory has run short: texts of up to {n_tokens} tokens can be computed now", "memory")
