"""The installed commands. Each has `--version`, and says what else to install if the model package is alone."""

from __future__ import annotations

import sys
from importlib import import_module, metadata

from training.stopping import INTERRUPTED


def train() -> int:
    return _run("rdt-train", "training.train")


def evaluate() -> int:
    return _run("rdt-evaluate", "training.evaluate")


def compare() -> int:
    return _run("rdt-compare", "training.compare")


def scorer() -> int:
    return _run("rdt-scorer", "training.scorer")


def release() -> int:
    return _run("rdt-release", "training.release")


def _run(command: str, module: str) -> int:
    if sys.argv[1:] == ["--version"]:
        print(command, metadata.version("rdt"))
        return 0
    try:
        main = import_module(module).main
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        print(f"{command}: {missing} is missing: pip install '.[training]' in the project's folder", file=sys.stderr)
        return 2
    status: int = main()
    return status
