"""From a checkpoint file and the name of a device to a model that runs there."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from rdt_core import LoadedModel, checkpoint, restore
from rdt_core.checkpoint import CheckpointError
from rdt_core.config import HALTINGS
from rdt_core.devices import pick_device
from rdt_core.precision import Precision, natural_precision, prepare
from service.settings import Settings

TRIAL_TOKENS = 64
"""At most, in the text that shows whether a model computes finite numbers."""


def load_model(path: Path, device_name: str, precision: Precision | Literal["auto"] = "fp32") -> LoadedModel:
    """Ready for inference. Raises `CheckpointError` for the file and `ValueError` for the device or the precision."""
    loaded = checkpoint.load(path, pick_device(device_name))
    prepare(loaded.model, natural_precision(loaded.model.device) if precision == "auto" else precision)
    return loaded


def read_models(settings: Settings) -> list[LoadedModel]:
    """The checkpoint on every device, in memory once for each."""
    models = [load_model(settings.checkpoint, device, settings.precision) for device in settings.device_names]
    if len({one.digest for one in models}) > 1:
        raise CheckpointError(settings.checkpoint, "was replaced while it was being read: try again")
    return models


def check_numbers(loaded: LoadedModel, path: Path) -> None:
    """Raise `CheckpointError` for a model that overflows, as finite weights may: it answers with NaN."""
    length = min(TRIAL_TOKENS, loaded.model.config.max_seq_len)
    tokens = torch.arange(length) * loaded.model.config.vocab_size // length
    masked = torch.arange(length) % 2 == 0
    tokens[masked] = loaded.tokenizer.mask_id
    for halting in HALTINGS:
        found = restore(loaded.model, tokens, masked, max_steps=2, threshold=0.0, halting=halting)
        for what, values in (("levels", found.levels), ("probabilities", found.probabilities)):
            if not all(map(math.isfinite, values)):
                raise CheckpointError(path, f"its weights are too large: the {what} of a text are not finite numbers")


def has_digest(path: Path, digest: str) -> bool:
    """Whether the file has this digest; false for one that cannot be read, of which the loader will say more."""
    with suppress(OSError):
        return path.is_file() and checkpoint.digest(path) == digest  # opening a pipe would wait for its writer
    return False
