"""Signals to a server: to end (SIGTERM, SIGINT), or to reload its checkpoint (SIGHUP)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def asked_to_end() -> asyncio.Event:
    """Set once the process has been sent SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


@contextmanager
def hangup_held() -> Iterator[None]:
    """Block SIGHUP, which would end the process, until `take_hangup`; also in children that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_hangup(act: Callable[[], None]) -> None:
    """SIGHUP calls `act` from now on; so does one that came while it was held."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def on_hangup(reload: Callable[[], None], stopped: asyncio.Event) -> None:
    """SIGHUP reloads; if it says that the terminal has gone, it ends the server."""
    in_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # which `nohup` has set

    def hang_up() -> None:
        if in_terminal and not _has_terminal():
            stopped.set()
        else:
            reload()

    take_hangup(hang_up)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
