"""From a checkpoint file and the name of a device to a model that runs there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rdt_core import LoadedModel, checkpoint
from rdt_core.devices import pick_device
from rdt_core.precision import Precision, natural_precision, prepare


def load_model(path: Path, device_name: str, precision: Precision | Literal["auto"] = "fp32") -> LoadedModel:
    """Ready for inference. Raises `CheckpointError` for the file and `ValueError` for the device or the precision."""
    loaded = checkpoint.load(path, pick_device(device_name))
    prepare(loaded.model, natural_precision(loaded.model.device) if precision == "auto" else precision)
    return loaded
