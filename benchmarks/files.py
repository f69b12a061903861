"""How a benchmark ends if a file that it was given is not there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from rdt_core.checkpoint import CheckpointError
from training.config import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def names_files(main: Callable[P, R]) -> Callable[P, R]:
    """Ends with one line if a file that was named cannot be read, or is not what it should be."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **named: P.kwargs) -> R:
        try:
            return main(*args, **named)
        except (CheckpointError, ConfigError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
            sys.exit(f"{Path(sys.argv[0]).stem}: {error}")

    return wrapped
