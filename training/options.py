"""Checks of command-line options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from rdt_core.devices import pick_device
from training.config import LARGEST_COUNT, TOKENS_A_BATCH, ConfigError


def path_named(name: str) -> Path:
    """For argparse: refuses a blank name, which `Path` takes for the current folder."""
    if not name.strip():
        raise argparse.ArgumentTypeError("no name: want a path")
    return Path(name)


def name_given(name: str) -> str:
    """For argparse: refuses a blank name."""
    if not name.strip():
        raise argparse.ArgumentTypeError("it is blank: want a name")
    return name


def device_named(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError`."""
    try:
        return pick_device(name)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def check_numbers(options: argparse.Namespace, lowest: Mapping[str, float], counts: Collection[str]) -> None:
    """Raise `ConfigError` for an option whose number, or one of them, is below its lowest or not finite, or a count so
    large that it is taken for a typing error.
    """
    for name, minimum in lowest.items():
        given, option = getattr(options, name), f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and not minimum <= value < math.inf:
                raise ConfigError(f"{option} is {value}: want >= {minimum:g}")
            if name in counts and value > LARGEST_COUNT:
                raise ConfigError(f"{option} is {value}: want <= {LARGEST_COUNT}")


def check_batch_size(batch_size: int, length: int) -> None:
    """Raise `ConfigError` for more tokens in a batch than memory may hold."""
    if (n := batch_size * length) > TOKENS_A_BATCH:
        raise ConfigError(f"--batch-size is {batch_size}: that is {n} tokens, want <= {TOKENS_A_BATCH}")
