"""Whether the caller is still there: requests of callers who have hung up are not computed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from service.errors import Cancelled

Value = TypeVar("Value")


async def unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """The result of the work; if the caller hangs up first, the work is cancelled (`Cancelled`)."""
    working = asyncio.current_task()
    assert working is not None, "called outside of a task"
    listening = asyncio.create_task(_disconnected(request))
    waits, left = True, False

    def leave(ended: asyncio.Task[None]) -> None:
        nonlocal left
        left = waits and not ended.cancelled() and working.cancel()

    listening.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and working.uncancel() == 0:  # else somebody else has cancelled it too
            raise Cancelled("the caller left before the answer") from None
        raise
    finally:
        waits = False  # `leave` may still be called, if the caller has just hung up
        listening.cancel()  # and if it has failed, the loop does not report that


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
