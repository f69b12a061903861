"""The commands as they are installed. Each tells its `--version`; with the model alone, what else to install."""

from __future__ import annotations

import sys
from importlib import import_module, metadata


def train() -> int:
    return _run("rdt-train", "training.__main__")


def evaluate() -> int:
    return _run("rdt-evaluate", "training.evaluate")


def _run(command: str, module: str) -> int:
    if sys.argv[1:] == ["--version"]:
        print(command, metadata.version("rdt"))
        return 0
    try:
        main = import_module(module).main
    except ModuleNotFoundError as error:
        print(f"{command}: {error.name} is missing: pip install 'rdt[training]'", file=sys.stderr)
        return 2
    status: int = main()
    return status
