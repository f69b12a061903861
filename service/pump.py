"""Turns a task that hands out values into an iterator of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

Value = TypeVar("Value")


async def pumped(work: Callable[[Callable[[Value], None]], Awaitable[None]]) -> AsyncGenerator[Value, None]:
    """The values that `work` passes to its argument, as they come; raises what `work` raises. Closing the generator
    cancels the work.

    The queue between them is unbounded: use it where requests are bounded anyway.
    """
    values: asyncio.Queue[tuple[Value] | None] = asyncio.Queue()
    working = asyncio.ensure_future(work(lambda value: values.put_nowait((value,))))
    working.add_done_callback(lambda _: values.put_nowait(None))
    try:
        while (kept := await values.get()) is not None:
            yield kept[0]
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)  # so that all it holds is free afterwards
        del working  # an error of it leads back here by its traceback
