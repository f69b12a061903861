"""From a checkpoint file and the name of a device to a model that runs there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from rdt_core import LoadedModel, checkpoint
from rdt_core.precision import Precision, natural_precision, prepare


def load_model(path: Path, device_name: str, precision: Precision | Literal["auto"] = "fp32") -> LoadedModel:
    """Ready for inference. Raises `CheckpointError` for the file and `ValueError` for the device or the precision."""
    loaded = checkpoint.load(path, pick_device(device_name))
    prepare(loaded.model, natural_precision(loaded.model.device) if precision == "auto" else precision)
    return loaded


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one. Raises `ValueError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name}: want auto, cpu, cuda or cuda:N")
    n_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_devices:
        raise ValueError(f"device is {name}: this machine has {n_devices} usable CUDA devices")
    return device
