from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import checkpoint
from rdt_core.checkpoint import export_release
from training.release import main


def test_a_release_has_half_the_bytes_a_name_and_its_defaults(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best_model.pt"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(target), "--name", "mini"]
    assert main([*arguments, "--halting", "settle", "--max_steps", "5", "--threshold", "0.2"]) == 0
    released = checkpoint.load(target)
    size = f"{target.stat().st_size / 1e6:.1f} MB"
    assert capsys.readouterr().out == f"{target}: mini@{released.digest[:12]}, {size}\n"
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


@pytest.mark.parametrize(
    ("progress", "waits"),
    [
        ({"averaged": False}, True),
        ({"averaged": True}, False),
        ({"best_of": "total"}, True),  # of a run before `averaged` was kept
        ({"best_of": "gate stage"}, False),
    ],
)
def test_weights_that_their_average_has_not_replaced_are_told(
    tiny_checkpoint: Path, tmp_path: Path, progress: dict[str, object], waits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = torch.load(tiny_checkpoint, weights_only=True)
    values["progress"] = {"average": [torch.zeros(2)], **progress}
    source = tmp_path / "source.pt"
    torch.save(values, source)
    assert main(["--checkpoint", str(source), "--output", str(tmp_path / "best_model.pt")]) == 0
    told = capsys.readouterr().out.strip().endswith("MB, the weights as they stood and not their running average")
    assert told == waits


def test_a_default_out_of_range_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best_model.pt"
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(target), "--max_steps", "0"]) == 2
    assert capsys.readouterr().err == "rdt-release: max_steps is 0: want a whole number >= 1\n"
    assert not target.exists()


@pytest.mark.parametrize("name", ["", "  "])
def test_a_blank_name_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best_model.pt"
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tiny_checkpoint), "--output", str(target), "--name", name])
    assert "argument --name: it is blank: want a name" in capsys.readouterr().err
    assert not target.exists()


def test_a_place_for_no_release_is_named(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", "/dev/null/best_model.pt"]) == 2
    problem = "the folder of --output is '/dev/null': want a folder to write in: File exists"
    assert capsys.readouterr().err == f"rdt-release: {problem}\n"


def test_a_release_that_could_not_be_loaded_leaves_the_old_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite in single precision, infinite in half: what serves from the file must not find that out."""
    values = torch.load(tiny_checkpoint, weights_only=True)
    values["model_state_dict"]["inject.weight"][0, 0] = 1e5
    large, served = tmp_path / "large.pt", tmp_path / "served.pt"
    torch.save(values, large)
    served.write_bytes(tiny_checkpoint.read_bytes())
    assert main(["--checkpoint", str(large), "--output", str(served)]) == 2
    assert "inject.weight holds values that are not finite numbers as float16" in capsys.readouterr().err
    assert served.read_bytes() == tiny_checkpoint.read_bytes()


def test_a_release_does_not_take_its_own_checkpoints_place(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.pt"
    own.write_bytes(tiny_checkpoint.read_bytes())
    assert main(["--checkpoint", str(own), "--output", str(tmp_path / "." / "own.pt")]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert own.read_bytes() == tiny_checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"defaults": {"d_model": 32}}, "d_model is no default of requests"), ({"dtype": torch.int8}, "dtype is torch")],
)
def test_what_no_release_can_have_is_named(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        export_release(tiny_checkpoint, tmp_path / "served.pt", **options)
