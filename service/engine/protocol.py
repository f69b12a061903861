"""The engine as its users see it, and observers of its passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from service.engine.queue import Place
from service.engine.types import Job, Outcome, Plan, Reading, Result
from service.errors import Internal, ServiceError

log = logging.getLogger(__name__)

Clock = Callable[[], float]
OnReading = Callable[[Reading], None]


def show(reading: Reading, on_reading: OnReading) -> ServiceError | None:
    """Show a pass to its observer. If that raises, returns the error that this job, and no other, fails with."""
    try:
        on_reading(reading)
    except Exception:
        log.exception("an observer of passes failed")
        return Internal()
    return None


class Watcher(Protocol):
    """Is told of every tick, for metrics."""

    def ticked(self, seconds: float, plan: Plan, outcome: Outcome) -> None:
        """A tick was made as planned, with a pass in it."""

    def tick_broke(self) -> None:
        """A tick failed, and its jobs with it."""

    def memory_ran_out(self) -> None:
        """There was no memory for a tick."""


class Engine(Protocol):
    """What the use case needs. Every submitted job ends exactly once: answered, refused, cancelled or failed."""

    @property
    def ready(self) -> bool:
        """Takes new work."""

    def reserve(self) -> AbstractContextManager[Place]:
        """A place in the queue, to be taken before tokenising; freed on leaving the block unless used.

        Raises `ResourceExhausted` when the queue is full, `Unavailable` when no new work is taken.
        """

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        """Wait for the job to be computed; `on_reading` sees every pass. Cancelling the wait takes the job out.

        Raises `ResourceExhausted` when its tokens do not fit in the queue, `DeadlineExceeded` when it is still in the
        queue at its deadline (later the result is what there is after the pass under way; but a shortage of memory
        may put it back into the queue), `Unavailable` when the engine stops first, `Internal` when the computation
        failed.
        """
