from __future__ import annotations

from collections.abc import Callable

import pytest

from service.pump import pumped


async def test_a_pump_passes_on_what_the_work_raises() -> None:
    async def work(put: Callable[[int], None]) -> None:
        put(1)
        raise ValueError("broken")

    values = pumped(work)
    assert await anext(values) == 1
    with pytest.raises(ValueError, match="broken"):
        await anext(values)
