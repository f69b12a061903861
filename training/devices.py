"""Reads the device that a command was told to compute on."""

from __future__ import annotations

import torch

from training.config import ConfigError


def device_named(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; without a name CUDA if there is any. Raises `ConfigError`."""
    n_cards = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if n_cards else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}: want cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}: want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= n_cards:
        raise ConfigError(f"--device is {name!r}: there is none here")
    return device
