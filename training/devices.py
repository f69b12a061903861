"""Reads the device that a command was told to compute on."""

from __future__ import annotations

import torch

from rdt_core.devices import pick_device
from training.config import ConfigError


def device_named(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError`."""
    try:
        return pick_device(name)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
