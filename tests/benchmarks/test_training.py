"""What the benchmark of training measures."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, training
from training.config import TrainConfig


def measured(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What `main` would measure."""
    configs: list[TrainConfig] = []

    def measure(config: TrainConfig, *_: object) -> dict[str, Any]:
        configs.append(config)
        return {}

    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(record, "finish", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["training", "--device", "cpu"])
    training.main()
    return configs


@pytest.mark.parametrize("native", [False, True])
def test_nothing_is_called_bfloat16_that_is_computed_in_float32(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_bfloat16", lambda _: native)
    configs = measured(monkeypatch)
    assert [config.mixed_precision for config in configs] == ([False, True] if native else [False]) * 2


def test_nothing_is_left_where_the_recipe_keeps_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in measured(monkeypatch):
        for folder in (config.output.checkpoint_dir, config.output.log_dir):
            assert Path(folder).is_relative_to(tempfile.gettempdir())
