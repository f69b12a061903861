"""`python -m training --config training/configs/base.yaml [--override FILE] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rdt_core.checkpoint import CheckpointError
from training.config import ConfigError
from training.config_file import load_config
from training.learner import TrainingDiverged
from training.options import device_named, path_named
from training.processes import meet
from training.stopping import INTERRUPTED, command
from training.trainer import Trainer


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-train", description="Train a Recursive Denoising Transformer.")
    parser.add_argument("--config", required=True, type=path_named, help="YAML file, see training/configs")
    parser.add_argument("--override", type=path_named, help="YAML file laid over it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--checkpoint", type=path_named, help="resume from this checkpoint")
    parser.add_argument(
        "assignments", nargs="*", metavar="section.key=value", help="single settings, e.g. training.batch_size=16"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        device = device_named(options.device)
        config = load_config(options.config, options.override, options.assignments)
        processes = meet(device)
        finished = Trainer(config, processes.device(device), options.checkpoint, processes).fit()
        processes.close()
    except (ConfigError, CheckpointError, TrainingDiverged, OSError) as error:
        print(f"rdt-train: {error}", file=sys.stderr)
        return 2
    return 0 if finished else INTERRUPTED
