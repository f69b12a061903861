"""The end of a process whose event loop stands still: a thread sees to it, since nothing else in the process can."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
import time

log = logging.getLogger(__name__)

POLL_SECONDS, SILENT_POLLS = 10.0, 3
"""An event loop stands still when nothing came of so many polls in a row. Polls are counted, not seconds, because the
process, or the one that watches it, may have been stopped meanwhile.
"""
LAST_WORDS_SECONDS = 2.0
"""How long a process that stands still has to write what its threads are doing. The log may be what it waits for."""


def watch_event_loop() -> None:
    """End the process, for a restart, once the event loop that runs now stands still."""
    threading.Thread(target=_watch, args=(asyncio.get_running_loop(),), name="watchdog", daemon=True).start()


def _watch(loop: asyncio.AbstractEventLoop) -> None:
    silent = 0
    while silent < SILENT_POLLS:
        turned = threading.Event()
        try:
            loop.call_soon_threadsafe(turned.set)
        except RuntimeError:  # it has been closed
            return
        if turned.wait(POLL_SECONDS):
            silent = 0
            time.sleep(POLL_SECONDS)
        elif loop.is_running():
            silent += 1
        else:
            return
    words = threading.Thread(target=_last_words, daemon=True)
    words.start()
    words.join(LAST_WORDS_SECONDS)
    os._exit(1)


def _last_words() -> None:
    log.critical("the event loop has stood still for %g s: ending the process", POLL_SECONDS * SILENT_POLLS)
    faulthandler.dump_traceback()
