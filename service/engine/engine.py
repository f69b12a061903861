"""Who runs when: the `Engine` every transport ends in, and its simplest implementation.

    reserve -> submit -> queue -> one worker thread: one job after another -> result

`SequentialEngine` keeps all its state on the event loop's thread; the worker thread sees one job, and
two callbacks. Its promises are those of `Engine`; a batching engine keeps them with more jobs live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol

from service.engine.queue import BoundedQueue, Place
from service.engine.types import Job, Result
from service.errors import DeadlineExceeded, Internal, ServiceError, Unavailable

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class RunJob(Protocol):
    """Restores one sequence in the calling thread; see `run_reference`."""

    def __call__(self, job: Job, after_pass: Callable[[], None], out_of_time: Callable[[], bool]) -> Result: ...


class Engine(Protocol):
    """Every submitted job ends exactly once: answered, refused, cancelled or failed."""

    @property
    def ready(self) -> bool:
        """Takes new work."""

    @property
    def waiting(self) -> int:
        """Requests queued, or being prepared in a reserved place."""

    @property
    def live(self) -> int:
        """Jobs being computed."""

    async def start(self) -> None: ...

    def reserve(self) -> AbstractContextManager[Place]:
        """A place in the queue, to be taken before tokenising; freed on leaving the block unless used.

        Raises `ResourceExhausted` when the queue is full, `Unavailable` when no new work is taken.
        """

    async def submit(self, job: Job, place: Place) -> Result:
        """Wait for the job to be computed. Cancelling the wait takes the job out at once.

        Raises `ResourceExhausted` when its tokens do not fit in the queue, `DeadlineExceeded` when the
        deadline came before the first pass (after it, what is there is the result), `Unavailable` when
        the engine stops first, `Internal` when the computation failed.
        """

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, finish what there is, and fail what is left after the grace period."""

    async def stop(self) -> None:
        """Fail whatever is left and end the worker."""


class _CallerLeft(Exception):
    """Ends a computation that nobody waits for any more."""


class _Entry:
    """A job in the engine, from submission to its end."""

    def __init__(self, job: Job, submitted: float) -> None:
        self.job = job
        self.submitted = submitted
        self.answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.overdue: asyncio.TimerHandle | None = None
        self.abandoned = False  # written by the event loop, read by the worker between passes

    @property
    def n_tokens(self) -> int:
        return len(self.job.tokens)

    def fail(self, error: ServiceError) -> None:
        if not self.answer.done():  # a caller who left has cancelled it
            self.answer.set_exception(error)


class SequentialEngine:
    """One job at a time, first come first served. Lives on the event loop that called `start`."""

    def __init__(
        self, run_job: RunJob, max_waiting: int, max_waiting_tokens: int, clock: Clock = time.monotonic
    ) -> None:
        self._run_job = run_job
        self._clock = clock
        self._queue: BoundedQueue[_Entry] = BoundedQueue(max_waiting, max_waiting_tokens)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._running: _Entry | None = None
        self._ready = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def live(self) -> int:
        return int(self._running is not None)

    async def start(self) -> None:
        self._ready = True

    def reserve(self) -> AbstractContextManager[Place]:
        self._check_ready()
        return self._queue.reserve()

    async def submit(self, job: Job, place: Place) -> Result:
        self._check_ready()
        entry = _Entry(job, self._clock())
        self._queue.put(entry, place)
        self._idle.clear()
        if job.deadline is not None:
            wait = max(0.0, job.deadline - entry.submitted)
            entry.overdue = asyncio.get_running_loop().call_later(wait, self._expire, entry)
        self._start_next()
        try:
            return await entry.answer
        finally:
            self._leave(entry)

    async def drain(self, grace_seconds: float) -> None:
        self._ready = False
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            log.warning("grace period of %g s is over: %d live, %d waiting", grace_seconds, self.live, self.waiting)
            self._fail_rest()

    async def stop(self) -> None:
        self._ready = False
        self._fail_rest()
        await self._idle.wait()  # at most one pass: the worker looks up after each
        self._worker.shutdown()

    def _check_ready(self) -> None:
        if not self._ready:
            raise Unavailable("the server is shutting down and takes no new work", "draining")

    def _start_next(self) -> None:
        """Hand the next job to the worker if it is free."""
        while self._running is None and (entry := self._queue.pop()) is not None:
            if self._is_overdue(entry):
                self._expire(entry)
                continue
            self._running = entry
            computing = asyncio.get_running_loop().run_in_executor(self._worker, self._compute, entry)
            computing.add_done_callback(partial(self._finish, entry))
        if self._running is None:
            self._idle.set()

    def _compute(self, entry: _Entry) -> Result:
        """In the worker thread: the whole recursion of one job."""
        started = self._clock()

        def after_pass() -> None:
            if entry.abandoned:
                raise _CallerLeft

        result = self._run_job(entry.job, after_pass, lambda: self._is_overdue(entry))
        return replace(result, queue_seconds=started - entry.submitted, compute_seconds=self._clock() - started)

    def _finish(self, entry: _Entry, done: asyncio.Future[Result]) -> None:
        """Back on the event loop: settle the job, whatever became of it, and go on."""
        self._running = None
        error = done.exception()
        if error is None and not entry.answer.done():
            entry.answer.set_result(done.result())
        elif error is not None and not isinstance(error, _CallerLeft):
            log.error("a job failed: %d tokens, %s", entry.n_tokens, entry.job.halting, exc_info=error)
            entry.fail(Internal("the model failed on this request; the server has logged why"))
        self._start_next()

    def _leave(self, entry: _Entry) -> None:
        """Nobody waits for the entry any more: take it out of the queue, or stop it after this pass."""
        entry.abandoned = True
        if entry.overdue is not None:
            entry.overdue.cancel()
        self._queue.remove(entry)

    def _is_overdue(self, entry: _Entry) -> bool:
        return entry.job.deadline is not None and self._clock() >= entry.job.deadline

    def _expire(self, entry: _Entry) -> None:
        """The deadline has come. A job already running decodes what it has after its present pass."""
        if entry is not self._running:
            self._queue.remove(entry)  # its place is free before its caller wakes up
            entry.fail(DeadlineExceeded("the time was over before the first pass"))

    def _fail_rest(self) -> None:
        left = [self._running] if self._running else []
        while (entry := self._queue.pop()) is not None:
            left.append(entry)
        for entry in left:
            entry.abandoned = True
            entry.fail(Unavailable("the server shut down before this request was finished", "draining"))
