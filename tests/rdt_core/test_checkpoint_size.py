"""A checkpoint takes no more memory than its file has: a small one cannot fill a server's."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdt_core import CheckpointError, checkpoint


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("torch reads it")

    monkeypatch.setattr(torch, "load", load)


@pytest.mark.usefixtures("unread")
def test_a_compressed_archive_is_refused_unread(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tiny_checkpoint) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in good.namelist():
            small.writestr(entry, bytes(100_000) if "/data/" in entry else good.read(entry))
    with pytest.raises(CheckpointError, match=r"^\S+bomb\.pt: refused: it unpacks to more than the file has"):
        checkpoint.read(bomb)


@pytest.mark.usefixtures("unread")
def test_parts_that_share_their_bytes_are_refused_unread(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(tiny_checkpoint.read_bytes())
    with zipfile.ZipFile(bomb, "a") as archive:
        archive.filelist += [entry for entry in archive.filelist if "/data/" in entry.filename] * 10
        archive.writestr("one-more", b"")  # so that the list is written
    with pytest.raises(CheckpointError, match=r"^\S+bomb\.pt: refused: it unpacks to more than the file has"):
        checkpoint.read(bomb)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(1).expand(16, 16), r"inject\.weight is no dense tensor"),
        (nested, r"inject\.weight is no dense tensor|more than tensors and plain values"),  # torch 2.15 itself
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_an_expanded_weight_is_refused_and_one_without_a_shape(
    tiny_checkpoint: Path, tmp_path: Path, make: Callable[[], Tensor], message: str
) -> None:
    held, path = checkpoint.read(tiny_checkpoint), tmp_path / "best_model.pt"
    checkpoint.save(path, replace(held, model_state_dict={**held.model_state_dict, "inject.weight": make()}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


def test_weights_that_share_their_values_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    held, path = checkpoint.read(tiny_checkpoint), tmp_path / "best_model.pt"
    largest = max(tensor.numel() for tensor in held.model_state_dict.values())
    values = torch.zeros(largest, dtype=torch.float16)
    weights = {name: values[: one.numel()].view(one.shape) for name, one in held.model_state_dict.items()}
    checkpoint.save(path, replace(held, model_state_dict=weights))
    with pytest.raises(CheckpointError, match=r"model_state_dict has weights that share their values"):
        checkpoint.load(path)


def test_weights_cut_from_one_tensor_are_as_good_as_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    held, path = checkpoint.read(tiny_checkpoint), tmp_path / "best_model.pt"
    weights = held.model_state_dict
    parts = torch.cat([one.flatten() for one in weights.values()]).split([one.numel() for one in weights.values()])
    cut = {name: part.view(one.shape) for (name, one), part in zip(weights.items(), parts, strict=True)}
    checkpoint.save(path, replace(held, model_state_dict=cut))
    assert checkpoint.load(path).model.state_dict().keys() == weights.keys()
