"""The commands as they are installed. With the model alone they say what else to install, in one line."""

from __future__ import annotations

import sys
from importlib import import_module


def serve() -> int:
    return _run("rdt-serve", "serve")


def denoise() -> int:
    return _run("rdt-denoise", "denoise")


def _run(command: str, name: str) -> int:
    try:
        cli = import_module("service.cli")
    except ModuleNotFoundError as error:
        print(f"{command}: {error.name} is missing: pip install 'rdt[service]'", file=sys.stderr)
        return 2
    status: int = getattr(cli, name)()
    return status
