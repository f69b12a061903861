"""What a model may be called: its name is in every answer, in logs and on labels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdt_core import checkpoint
from rdt_core.checkpoint import CheckpointError

BAD_NAMES = ["\ud800", "a\nb", "x" * 256, "x" * 10**6, {"a": "b"}, 7, b"tiny", torch.zeros(2)]


@pytest.fixture
def path(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_checkpoint, tmp_path / "best_model.pt"))


def rename(path: Path, name: object) -> None:
    held = checkpoint.read(path)
    checkpoint.save(path, replace(held, config={**held.config, "name": name}))


@pytest.mark.parametrize("name", ["tiny", "größe 2 · 猫", "x" * 255])
def test_a_short_line_is_a_name(path: Path, name: str) -> None:
    rename(path, name)
    assert checkpoint.load(path).name == name


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_another_name_is_refused(path: Path, name: object) -> None:
    rename(path, name)
    with pytest.raises(CheckpointError, match=r"its name is .*: want at most 255 printable characters$") as refused:
        checkpoint.load(path)
    assert len(str(refused.value).encode()) < len(str(path)) + 200


@pytest.mark.parametrize("name", [None, ""])
def test_the_folder_of_a_nameless_model_is_a_name_too(path: Path, name: str | None) -> None:
    folder = path.with_name("a\nb")
    folder.mkdir()
    rename(path, name)
    with pytest.raises(CheckpointError, match=r"its name is 'a\\nb'"):
        checkpoint.load(path.rename(folder / path.name))


def test_a_release_under_such_a_name_replaces_nothing(path: Path) -> None:
    released = path.with_name("released.pt")
    released.write_bytes(b"the last one")
    with pytest.raises(CheckpointError, match="its name is"):
        checkpoint.export_release(path, released, name="a\nb")
    assert released.read_bytes() == b"the last one"


def test_an_error_can_be_told_whatever_the_file_holds(path: Path) -> None:
    held = checkpoint.read(path)
    weights = {**held.model_state_dict, "\ud800" * 10**6: next(iter(held.model_state_dict.values()))}
    checkpoint.save(path, replace(held, model_state_dict=weights))
    with pytest.raises(CheckpointError, match=r"model_state_dict has \\ud800") as refused:
        checkpoint.load(path)
    assert len(str(refused.value).encode()) < 10_000
