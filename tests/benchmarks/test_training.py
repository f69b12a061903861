"""What the benchmark of training measures."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks import record, training
from training.config import TrainConfig


@pytest.mark.parametrize("native", [False, True])
def test_nothing_is_called_bfloat16_that_is_computed_in_float32(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool] = []

    def measure(config: TrainConfig, *_: object) -> dict[str, Any]:
        measured.append(config.mixed_precision)
        return {}

    monkeypatch.setattr(training, "has_bfloat16", lambda _: native)
    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(record, "finish", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["training", "--device", "cpu"])
    training.main()
    assert measured == ([False, True] if native else [False]) * 2
