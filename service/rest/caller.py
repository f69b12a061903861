"""Whether the caller is still there: nobody computes for one who has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from service.errors import Cancelled

Value = TypeVar("Value")


async def unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """The result of the work; if the caller hangs up first, the work is cancelled (`Cancelled`)."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the caller left before the answer")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)  # both have ended when this one does


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
