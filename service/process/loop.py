"""The event loop of every process that answers callers or computes, and the end of such a process."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from service.engine.replica import THREAD_NAME

try:
    import uvloop
except ImportError:  # there is none for Windows
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop


def run(main: Coroutine[Any, Any, int]) -> int:
    """`asyncio.run`, on uvloop where there is one. Ends the process at once if a stuck thread would keep it alive."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        status = runner.run(main)
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(status)
    return status
