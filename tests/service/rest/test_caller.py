"""`unless_gone`: whoever hangs up takes the work along, and nobody else."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from starlette.requests import Request

from service.errors import Cancelled, Internal
from service.rest.caller import unless_gone


class Caller:
    """A connection that says nothing until it is told to."""

    def __init__(self) -> None:
        self.says: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self.request = Request({"type": "http"}, self._receive)

    def hang_up(self) -> None:
        self.says.put_nowait({"type": "http.disconnect"})

    async def _receive(self) -> dict[str, Any]:
        said = await self.says.get()
        if isinstance(said, Exception):
            raise said
        return said


class Work:
    def __init__(self) -> None:
        self.begun, self.answer, self.ended = asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> int:
        try:
            self.begun.set()
            await self.answer.wait()
            return 7
        finally:
            self.ended = True


async def begin(caller: Caller, work: Work) -> asyncio.Task[int]:
    task = asyncio.create_task(unless_gone(caller.request, work()))
    await work.begun.wait()
    return task


async def test_the_answer_comes_through_and_nobody_listens_any_more() -> None:
    caller, work = Caller(), Work()
    task = await begin(caller, work)
    caller.says.put_nowait({"type": "http.request", "body": b"more"})  # no reason to leave
    await asyncio.sleep(0)
    work.answer.set()
    assert await task == 7
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_caller_who_hangs_up_ends_the_work() -> None:
    caller, work = Caller(), Work()
    task = await begin(caller, work)
    caller.hang_up()
    with pytest.raises(Cancelled, match="the caller left before the answer"):
        await task
    assert work.ended
    assert task.cancelling() == 0


async def test_a_connection_that_breaks_is_a_caller_who_hangs_up(caplog: pytest.LogCaptureFixture) -> None:
    caller, work = Caller(), Work()
    task = await begin(caller, work)
    caller.says.put_nowait(OSError("broken"))
    with pytest.raises(Cancelled):
        await task
    assert work.ended
    del task
    gc.collect()
    assert caplog.records == [], "nor is it told of an error that nobody has looked at"


async def test_an_answer_and_a_hangup_at_once_are_a_hangup() -> None:
    caller, work = Caller(), Work()
    task = await begin(caller, work)
    caller.hang_up()
    await asyncio.sleep(0)
    work.answer.set()
    with pytest.raises(Cancelled):
        await task


@pytest.mark.parametrize("hangup_first", [False, True])
async def test_a_hangup_that_comes_with_the_answer_cancels_nothing_later(hangup_first: bool) -> None:
    caller, work = Caller(), Work()

    async def answer_and_write() -> str:
        await unless_gone(caller.request, work())
        for _ in range(3):
            await asyncio.sleep(0)
        return "written"

    task = asyncio.create_task(answer_and_write())
    await work.begun.wait()
    await asyncio.sleep(0)
    for at_once in (caller.hang_up, work.answer.set) if hangup_first else (work.answer.set, caller.hang_up):
        at_once()
    assert await task == "written"


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_who_is_cancelled_from_outside_is_cancelled(hangs_up: bool) -> None:
    caller, work = Caller(), Work()
    task = await begin(caller, work)
    if hangs_up:
        caller.hang_up()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended
    assert task.cancelled()


async def test_an_error_of_the_work_is_its_own() -> None:
    async def fail() -> None:
        raise Internal("no luck")

    with pytest.raises(Internal, match="no luck"):
        await unless_gone(Caller().request, fail())
