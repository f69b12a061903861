"""Who waits for a job."""

from __future__ import annotations

from service.engine.callers import Callers


async def test_who_has_left_is_not_kept() -> None:
    callers = Callers()
    callers.join(1, on_reading=None)
    assert [callers.leave(1), callers.leave(1)] == [True, False]
