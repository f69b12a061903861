from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import RDT, Checkpoint, CheckpointError, Tokenizer, checkpoint, restore
from rdt_core.checkpoint import REQUIRED_KEYS, load, read, save
from tests.rdt_core.sequences import random_sequences

Values = dict[str, Any]


@pytest.fixture
def values(tiny_checkpoint: Path) -> Values:
    """What a good file holds, to be spoilt."""
    contents = torch.load(tiny_checkpoint, weights_only=True)
    assert isinstance(contents, dict)
    return contents


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def write(path: Path, contents: object) -> Path:
    torch.save(contents, path)
    return path


def test_what_is_saved_is_what_is_loaded(tiny_checkpoint: Path, tiny_model: RDT, tiny_tokenizer: Tokenizer) -> None:
    loaded = load(tiny_checkpoint)
    assert loaded.model.config == tiny_model.config
    assert loaded.tokenizer.json == tiny_tokenizer.json
    assert loaded.name == "tiny"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_every_field_survives(tmp_path: Path) -> None:
    sent = Checkpoint({"w": torch.ones(2)}, {"model": {}}, "{}", 3, 70, 1.5, {"lr": 1}, {"k": 2}, {"best_loss": 0.1})
    save(tmp_path / "new" / "folder" / "model.pt", sent)
    got = read(tmp_path / "new" / "folder" / "model.pt")
    assert torch.equal(got.model_state_dict["w"], torch.ones(2))
    assert {**vars(got), "model_state_dict": None} == {**vars(sent), "model_state_dict": None}


def test_a_file_of_another_tool_may_have_nothing_but_what_is_required(values: Values, tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "model.pt", {key: values[key] for key in REQUIRED_KEYS}))
    assert (loaded.name, loaded.checkpoint.epoch, loaded.checkpoint.loss) == ("tiny", 0, None)


def test_the_digest_is_of_the_file_and_a_nameless_model_is_called_by_its_folder(
    tiny_checkpoint: Path, values: Values, tmp_path: Path
) -> None:
    del values["config"]["name"]
    folder = tmp_path / "rdt-nameless"
    folder.mkdir()
    loaded = load(write(folder / "best_model.pt", values))
    assert loaded.name == "rdt-nameless"
    assert len(loaded.digest) == 64
    assert loaded.digest != load(tiny_checkpoint).digest


@pytest.mark.parametrize("moment", ["torch.save", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file_and_no_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def fail(_from: object, to: Any) -> None:
        if hasattr(to, "write"):
            to.write(b"half of the new one")
        raise OSError("disk full")

    monkeypatch.setattr(moment, fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, Checkpoint({}, {}, ""))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_takes_the_place_of_the_old_file_is_on_the_disk_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    save(tmp_path / "model.pt", Checkpoint({}, {}, ""))
    assert calls == ["fsync", "replace"]


class Trap:
    """Touches a file when it is unpickled by something careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_is_refused_and_not_run(values: Values, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "model.pt", values | {"loss": Trap(marker)})
    assert refusal(path).startswith("refused: it holds more than tensors and plain values")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the trap was no trap"


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Trap(marker)))
    assert "not a checkpoint" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tiny_checkpoint: Path, tmp_path: Path, share: float) -> None:
    whole, path = tiny_checkpoint.read_bytes(), tmp_path / "model.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.97])
def test_a_file_with_a_hole_in_it_is_refused(tiny_checkpoint: Path, tmp_path: Path, where: float) -> None:
    damaged, path = bytearray(tiny_checkpoint.read_bytes()), tmp_path / "model.pt"
    start = int(where * len(damaged))
    damaged[start : start + 200] = bytes(b ^ 0xFF for b in damaged[start : start + 200])
    path.write_bytes(damaged)
    assert refusal(path)


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == "no such file"
    assert refusal(tmp_path) == "no regular file"
    (tmp_path / "text.pt").write_text("hello")
    assert "not a checkpoint" in refusal(tmp_path / "text.pt")


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    assert "holds a list" in refusal(write(tmp_path / "model.pt", [1, 2]))


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_key_is_named(values: Values, tmp_path: Path, key: str) -> None:
    del values[key]
    assert refusal(write(tmp_path / "model.pt", values)) == f"has no {key}"


def drop_weight(values: Values) -> None:
    del values["model_state_dict"]["inject.weight"]


def add_weight(values: Values) -> None:
    values["model_state_dict"]["extra.weight"] = torch.zeros(1)


def number_weight(values: Values) -> None:
    values["model_state_dict"][7] = torch.zeros(1)


def cut_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"] = torch.zeros(16, 15)


def poison_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"][3, 3] = float("nan")


def immense_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"] = torch.full((16, 16), 1e300, dtype=torch.float64)


def sparse_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"] = torch.eye(16).to_sparse()


def blind_tokenizer(values: Values) -> None:
    values["tokenizer"] = json.dumps(json.loads(values["tokenizer"]) | {"added_tokens": []})


def whole_number_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"] = torch.zeros(16, 16, dtype=torch.int64)


def meta_weight(values: Values) -> None:
    values["model_state_dict"]["inject.weight"] = torch.zeros(16, 16, device="meta")


def boundless_model(values: Values) -> None:
    values["config"]["model"]["d_model"] = 2**30


def list_weights(values: Values) -> None:
    values["model_state_dict"] = [1, 2]


def other_vocabulary(values: Values) -> None:
    values["config"]["model"]["vocab_size"] += 1


def no_tokenizer(values: Values) -> None:
    values["tokenizer"] = "{}"


def number_tokenizer(values: Values) -> None:
    values["tokenizer"] = 5


def no_model_section(values: Values) -> None:
    del values["config"]["model"]


def no_config(values: Values) -> None:
    values["config"] = None


def unknown_setting(values: Values) -> None:
    values["config"]["model"]["n_layers"] = 2


def bad_setting(values: Values) -> None:
    values["config"]["model"]["n_heads"] = 3


def mistyped_setting(values: Values) -> None:
    values["config"]["model"]["suppress_tokens"] = 5


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (drop_weight, "model_state_dict has no inject.weight"),
        (add_weight, "model_state_dict has extra.weight, which the configuration does not"),
        (number_weight, "model_state_dict is not a dictionary of tensors"),
        (cut_weight, "inject.weight has shape (16, 15), want (16, 16)"),
        (poison_weight, "inject.weight holds values that are not finite numbers"),
        (immense_weight, "inject.weight holds values that are not finite numbers"),
        (sparse_weight, "inject.weight is no dense tensor"),
        (blind_tokenizer, "tokenizer: the tokenizer reads [MASK] as text"),
        (whole_number_weight, "inject.weight holds torch.int64: want a floating point format"),
        (meta_weight, "inject.weight is no dense tensor"),
        (boundless_model, "config: no such model can be made"),
        (list_weights, "model_state_dict is not a dictionary of tensors"),
        (other_vocabulary, "the tokenizer has"),
        (no_tokenizer, "tokenizer: not a tokenizer JSON"),
        (number_tokenizer, "tokenizer: "),
        (no_model_section, "config has no 'model' section"),
        (no_config, "config has no 'model' section"),
        (unknown_setting, "config: n_layers is not a model setting"),
        (bad_setting, "config: d_model is 16"),
        (mistyped_setting, "config: "),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch 2.11
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14
def test_a_checkpoint_that_does_not_fit_together_is_refused(
    values: Values, tmp_path: Path, spoil: Callable[[Values], None], problem: str
) -> None:
    spoil(values)
    assert refusal(write(tmp_path / "model.pt", values)).startswith(problem)


def test_a_release_is_half_as_large_and_predicts_the_same(
    values: Values, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    momentum = {name: tensor.clone() for name, tensor in values["model_state_dict"].items()}
    training = write(tmp_path / "train.pt", values | {"optimizer_state_dict": momentum, "progress": {}, "step": 9})
    release = tmp_path / "release.pt"
    checkpoint.export_release(training, release, name="rdt-tiny")
    contents = read(release)
    assert {tensor.dtype for tensor in contents.model_state_dict.values()} == {torch.float16}
    assert contents.optimizer_state_dict is contents.scheduler_state_dict is contents.progress is None
    assert contents.step == 9
    assert release.stat().st_size < 0.6 * training.stat().st_size

    full, half = load(tiny_checkpoint), load(release)
    assert half.name == "rdt-tiny"
    assert half.model.embedding.weight.dtype == torch.float32
    tokens, masked, _ = random_sequences([20])
    expected = restore(full.model, tokens, masked, max_steps=4, threshold=0)
    found = restore(half.model, tokens, masked, max_steps=4, threshold=0)
    assert found.probabilities == pytest.approx(expected.probabilities, rel=0.02)
    assert found.levels == pytest.approx(expected.levels, rel=0.02)


def test_a_release_does_not_say_where_the_run_kept_its_files(values: Values, tmp_path: Path) -> None:
    places = {"data": {"dataset_name": "/home/me/a.txt,/mnt/b.txt.xz", "tokenizer_name": "google/bert"}, "seed": 3}
    values["config"]["training"] = places
    release = tmp_path / "release.pt"
    checkpoint.export_release(write(tmp_path / "train.pt", values), release)
    told = read(release).config["training"]
    assert told == {"data": {"dataset_name": "a.txt,b.txt.xz", "tokenizer_name": "google/bert"}, "seed": 3}


def test_a_release_that_could_not_be_served_replaces_nothing(values: Values, tmp_path: Path) -> None:
    release = tmp_path / "release.pt"
    release.write_bytes(b"what was there")
    values["config"]["model"]["vocab_size"] += 1
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ entries, the model's vocab_size is"):
        checkpoint.export_release(write(tmp_path / "train.pt", values), release)
    values["config"]["model"]["vocab_size"] -= 1
    weights = values["model_state_dict"]
    name = next(iter(weights))
    for broken, problem in (
        ({**weights, name: "x"}, "model_state_dict is not a dictionary of tensors"),
        ({**weights, name: weights[name] * math.nan}, f"{name} holds values that are not finite numbers$"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            checkpoint.export_release(write(tmp_path / "train.pt", {**values, "model_state_dict": broken}), release)
    for name, value in (("tokenizer", {}), ("config", "x")):
        values[name] = value
        with pytest.raises(CheckpointError, match=name):
            checkpoint.export_release(write(tmp_path / "train.pt", values), release)
    assert release.read_bytes() == b"what was there"


def test_a_file_replaced_while_it_is_read_is_not_taken_for_the_other(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a model would be served under the digest of another."""
    path = tmp_path / "best_model.pt"
    torch.save(values, path)
    read = checkpoint.read

    def slow_read(source: str | Path) -> Checkpoint:
        contents = read(source)
        checkpoint.save(path, contents)
        return contents

    monkeypatch.setattr(checkpoint, "read", slow_read)
    with pytest.raises(CheckpointError, match="was replaced while it was being read: try again"):
        checkpoint.load(path)


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of it says nothing of a disk; what it met does."""

    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    def fail_for_want_of_space(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            fail()

    def write_nothing(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = r"\[Errno 28\] No space left on device$"
    for how, why in ((fail, r"\[enforce fail"), (fail_for_want_of_space, full), (write_nothing, full)):
        monkeypatch.setattr(torch, "save", how)
        with pytest.raises(OSError, match=rf"model.pt: cannot be written: {why}"):
            checkpoint.save(tmp_path / "model.pt", Checkpoint({}, {}, "{}"))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_so_does_the_mode(values: Values, tmp_path: Path) -> None:
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    save(link, Checkpoint(**values))
    assert link.is_symlink()
    assert load(real).tokenizer.vocab_size == 121
    assert real.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_is_not_replaced(values: Values, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=r"cannot be written: it is no regular file"):
            save(target, Checkpoint(**values))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_refused_type_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"config": tmp_path}, file)
    assert re.fullmatch(r"refused: it holds more than tensors and plain values: pathlib\S*Path", refusal(file))
