from __future__ import annotations

from pathlib import Path

import pytest

from rdt_core import checkpoint
from training.release import main


def test_a_release_has_half_the_bytes_a_name_and_its_defaults(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best_model.pt"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(target), "--name", "mini"]
    assert main([*arguments, "--halting", "settle", "--max_steps", "5", "--threshold", "0.2"]) == 0
    released = checkpoint.load(target)
    assert capsys.readouterr().out.startswith(f"{target}: mini@{released.digest[:12]}, ")
    config = released.model.config
    assert (config.halting, config.max_steps, config.threshold) == ("settle", 5, 0.2)
    weights = checkpoint.read(target).model_state_dict.values()
    assert {tensor.element_size() for tensor in weights} == {2}


def test_without_options_the_runs_own_defaults_stay(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "best_model.pt"
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(target)]) == 0
    released, source = checkpoint.load(target), checkpoint.load(tiny_checkpoint)
    assert released.model.config == source.model.config
    assert released.name == source.name


def test_a_default_out_of_range_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best_model.pt"
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(target), "--max_steps", "0"]) == 2
    assert capsys.readouterr().err == "rdt-release: max_steps is 0: want a whole number >= 1\n"
    assert not target.exists()
