"""The event loop of every process that answers callers or computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:  # not made for Windows
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

Value = TypeVar("Value")


def run(main: Coroutine[Any, Any, Value]) -> Value:
    """As `asyncio.run`, on uvloop where there is one."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
