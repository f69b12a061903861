"""The interface that carries out the scheduler's plans: it separates who runs from how it is computed."""

from __future__ import annotations

from typing import Protocol

from service.engine.types import Outcome, Plan


class OutOfMemory(Exception):
    """There was not enough memory for a tick. Fewer tokens may do."""


class Backend(Protocol):
    """Holds the live batch between ticks. Called from one thread."""

    ticks_late: int
    """Ticks from a sequence's last pass to the one that reports it, where the plan made that pass the last; 0: in the
    same tick. Where the gate stops a sequence, it may be reported one tick later still."""

    def run(self, plan: Plan) -> Outcome:
        """Drop and admit as planned, one pass over everything live, decode what settles or leaves, retire.

        Raises `OutOfMemory`; whatever else it raises is a defect.
        """

    def reset(self) -> None:
        """Forget the live batch: after a tick that failed, nothing of it can be trusted."""
