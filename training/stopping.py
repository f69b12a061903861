"""Ending early: a signal is noted, the step finished and the state saved."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import ParamSpec

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit status, as shells have it
SAME_REQUEST_SECONDS = 2.0
"""Signals so close to the first are the same request: a scheduler signals every process, and launchers pass it on."""

Arguments = ParamSpec("Arguments")


@contextmanager
def stop_signal(clock: Callable[[], float] = time.monotonic) -> Iterator[list[int]]:
    """A list that becomes non-empty on SIGINT or SIGTERM; one that comes again later acts as it always does."""
    received: list[int] = []
    first_at = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        if not received:
            first_at = clock()
        elif clock() - first_at > SAME_REQUEST_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        received.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


def leave_signals_to_the_trainer(_worker: int) -> None:
    """For processes that prepare batches: a signal to the process group must not end them before the step is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def command(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """A command that Ctrl-C ends without a traceback, and that writes characters which the encoding of standard output
    does not have as escapes.
    """

    @wraps(main)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(*arguments, **options)
        except KeyboardInterrupt:
            return INTERRUPTED

    return run
