"""From a checkpoint file to models that run: number formats, files that change meanwhile, numbers that overflow."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdt_core import LoadedModel, checkpoint
from rdt_core.checkpoint import CheckpointError
from service import loading
from service.loading import check_numbers, load_model, read_models
from service.settings import Settings


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Number formats that models were made ready for."""
    asked: list[str] = []
    monkeypatch.setattr(loading, "prepare", lambda _model, precision: asked.append(precision))
    return asked


def test_the_device_chooses_the_number_format_unless_one_is_named(
    tiny_checkpoint: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "natural_precision", lambda device: f"that of {device}")
    for precision in ("auto", "int8"):
        load_model(tiny_checkpoint, "cpu", precision)  # type: ignore[arg-type]
    assert prepared == ["that of cpu", "int8"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"best_model.pt: cannot be read: Permission denied$"):
        load_model(tiny_checkpoint, "cpu")


@pytest.mark.usefixtures("prepared")
def test_devices_that_read_different_files_are_not_served_together(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "device_names", ["cpu", "cpu"])
    settings = Settings(checkpoint=tiny_checkpoint)
    assert [one.digest for one in read_models(settings)] == [checkpoint.digest(tiny_checkpoint)] * 2
    digests = iter("ab")
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *found: replace(load(*found), digest=next(digests)))
    with pytest.raises(CheckpointError, match=r"best_model\.pt: was replaced while it was being read: try again"):
        read_models(settings)


@pytest.mark.parametrize(
    ("what", "numbers"),
    [("levels", [0.5, math.nan]), ("levels", [math.inf, 0.5]), ("probabilities", [math.nan, 0.5, 0.5])],
)
@pytest.mark.parametrize("halting", ["gate", "settle"])
def test_a_single_number_that_is_not_finite_is_one_too_many(
    tiny_checkpoint: Path, what: str, numbers: list[float], halting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(tiny_checkpoint, "cpu")
    restore = loading.restore

    def overflow(*given: Any, **named: Any) -> Any:
        found = restore(*given, **named)
        return replace(found, **{what: numbers}) if named["halting"] == halting else found

    check_numbers(loaded, tiny_checkpoint)
    monkeypatch.setattr(loading, "restore", overflow)
    with pytest.raises(CheckpointError, match=rf"best_model\.pt: its weights are too large: the {what} of a text are"):
        check_numbers(loaded, tiny_checkpoint)


def test_the_trial_text_has_gaps_words_of_all_the_vocabulary_and_two_passes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: LoadedModel = load_model(tiny_checkpoint, "cpu")
    restore, tried = loading.restore, []

    def note(model: Any, tokens: Any, masked: Any, **named: Any) -> Any:
        found = restore(model, tokens, masked, **named)
        tried.append((tokens, masked, found.steps))
        return found

    monkeypatch.setattr(loading, "restore", note)
    check_numbers(loaded, tiny_checkpoint)
    assert len(tried) == 2, "either way of halting"
    for tokens, masked, steps in tried:
        assert (tokens[masked] == loaded.tokenizer.mask_id).all()
        assert masked.float().mean() == 0.5
        words = tokens[~masked]
        assert words.diff().min() > 0
        assert words[0] < loaded.model.config.vocab_size * 0.1
        assert words[-1] > loaded.model.config.vocab_size * 0.9
        assert steps == 2
