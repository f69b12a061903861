"""`python -m training --config training/configs/base.yaml [--override FILE] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rdt_core.checkpoint import CheckpointError
from training.config import ConfigError, load_config
from training.processes import meet
from training.trainer import Trainer, TrainingDiverged


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-train", description="Train a Recursive Denoising Transformer.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see training/configs")
    parser.add_argument("--override", type=Path, help="YAML file laid over it")
    parser.add_argument("--device", help="cuda or cpu (default: cuda when there is one)")
    parser.add_argument("--checkpoint", type=Path, help="resume from this checkpoint")
    parser.add_argument(
        "assignments", nargs="*", metavar="section.key=value", help="single settings, e.g. training.batch_size=16"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        device = _device(options.device)
        config = load_config(options.config, options.override, options.assignments)
        processes = meet(device)
        finished = Trainer(config, processes.device(device), options.checkpoint, processes).fit()
        processes.close()
    except (ConfigError, CheckpointError, TrainingDiverged) as error:
        print(f"rdt-train: {error}", file=sys.stderr)
        return 2
    return 0 if finished else 130


def _device(name: str | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}: want cuda or cpu") from error
    if device.type == "cuda" and not has_cuda:
        raise ConfigError(f"--device is {name!r}: there is none here")
    return device


if __name__ == "__main__":
    sys.exit(main())
