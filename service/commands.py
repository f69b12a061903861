"""The installed commands. Each has `--version`, and names the extra to install if a package is missing."""

from __future__ import annotations

import sys
from importlib import import_module

from service.version import release

INTERRUPTED = 130
"""The status after Ctrl-C, as shells have it."""


def serve() -> int:
    return _run("rdt-serve", "serve")


def denoise() -> int:
    return _run("rdt-denoise", "denoise")


def _run(command: str, name: str) -> int:
    if sys.argv[1:] == ["--version"]:
        print(command, release())
        return 0
    try:
        try:
            cli = import_module("service.cli")
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            print(f"{command}: {missing} is missing: pip install '.[service]' in the project's folder", file=sys.stderr)
            return 2
        status: int = getattr(cli, name)()
    except KeyboardInterrupt:  # a server takes it for SIGTERM once it has an event loop
        return INTERRUPTED
    return status
