"""The call being answered: what its log lines and its span say about it, the same on every transport."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from service.errors import ServiceError

WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Call:
    id: str
    outcome: str = "ok"  # or the code of the error it ended with
    trace_id: str = ""  # 32 hex digits; empty unless traced


current: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that this task, or one it started, works for."""


def begin(proposed_id: str) -> Call:
    """A call under the caller's own id if that is well-formed, or under a fresh one.

    It stays current until the task ends and is never reset: each call has a task of its own, and a server logs a
    crash only after everything here has been left.
    """
    call = Call(proposed_id if WELL_FORMED_ID.fullmatch(proposed_id) else fresh_id())
    current.set(call)
    return call


def fresh_id() -> str:
    return f"{random.getrandbits(128):032x}"


def note(outcome: str) -> None:
    """Record how the current call, if there is one, has ended."""
    if (call := current.get()) is not None:
        call.outcome = outcome


@contextmanager
def ending(call: Call) -> Iterator[None]:
    """Record the error that is raised inside, unless an outcome has been recorded already."""
    try:
        yield
    except BaseException as error:
        if call.outcome == "ok":
            call.outcome = outcome_of(error)
        raise


def milliseconds(seconds: float) -> float:
    """A duration as answers, log lines and spans say it."""
    return round(seconds * 1e3, 3)


def outcome_of(error: BaseException) -> str:
    """The neutral code of whatever ended a request."""
    if isinstance(error, ServiceError):
        return error.code
    left = isinstance(error, asyncio.CancelledError | GeneratorExit)  # GeneratorExit: left between two passes
    return "cancelled" if left else "internal"
