"""The commands as they are installed. With the model alone they say what else to install, in one line."""

from __future__ import annotations

import sys
from importlib import import_module


def train() -> int:
    return _run("rdt-train", "training.__main__")


def evaluate() -> int:
    return _run("rdt-evaluate", "training.evaluate")


def _run(command: str, module: str) -> int:
    try:
        main = import_module(module).main
    except ModuleNotFoundError as error:
        print(f"{command}: {error.name} is missing: pip install 'rdt[training]'", file=sys.stderr)
        return 2
    status: int = main()
    return status
