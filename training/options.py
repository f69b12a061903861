"""Checks of command-line options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from rdt_core.devices import pick_device
from training.config import TOKENS_A_BATCH, ConfigError


def path_named(name: str) -> Path:
    """For argparse: refuses a blank name, which `Path` takes for the current folder."""
    if not name.strip():
        raise argparse.ArgumentTypeError("no name: want a path")
    return Path(name)


def device_named(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError`."""
    try:
        return pick_device(name)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def check_at_least(options: argparse.Namespace, lowest: Mapping[str, float]) -> None:
    """Raise `ConfigError` for an option whose number, or one of them, is below its lowest or not finite."""
    for name, minimum in lowest.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and not minimum <= value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: want >= {minimum:g}")


def check_batch_size(batch_size: int, length: int) -> None:
    """Raise `ConfigError` for more tokens in a batch than memory may hold."""
    if (n := batch_size * length) > TOKENS_A_BATCH:
        raise ConfigError(f"--batch-size is {batch_size}: that is {n} tokens, want <= {TOKENS_A_BATCH}")
