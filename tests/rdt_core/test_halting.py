from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.halting import due, halt_reason


@given(st.integers(0, 600), st.integers(1, 40))
def test_the_pace_is_even_monotone_and_ends_with_everything(n_masked: int, max_steps: int) -> None:
    pace = [due(n_masked, step, max_steps) for step in range(max_steps + 1)]
    assert pace[0] == 0
    assert pace[-1] == n_masked
    assert pace == sorted(pace)
    assert all(count == math.ceil(n_masked * step / max_steps - 1e-9) for step, count in enumerate(pace))


@pytest.mark.parametrize(
    ("level", "step", "all_settled", "out_of_time", "reason"),
    [
        (0.4, 1, False, False, "gate"),
        (0.4, 8, False, False, "gate"),
        (0.5, 1, False, False, None),
        (0.5, 8, False, False, "max_steps"),
        (0.5, 1, False, True, "deadline"),
        (0.4, 1, False, True, "gate"),
        (0.5, 8, False, True, "max_steps"),
        (0.0, 3, True, False, "gate"),
        (0.5, 3, True, True, "gate"),
        (0.0, 8, True, False, "max_steps"),
    ],
)
def test_why_a_sequence_stops(
    level: float, step: int, all_settled: bool, out_of_time: bool, reason: str | None
) -> None:
    assert reason == halt_reason(
        level=level, threshold=0.5, step=step, max_steps=8, all_settled=all_settled, out_of_time=out_of_time
    )
