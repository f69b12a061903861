"""From the name of a device to the device."""

from __future__ import annotations

import torch


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
