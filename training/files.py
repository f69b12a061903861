"""Folders that must take files, found out before the work."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from training.config import ConfigError


def make_folder(path: Path, named: str) -> None:
    """Make it if need be. Raises `ConfigError`, which calls the setting what it is `named`, unless it takes files."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{named} is {str(path)!r}: want a folder to write in: {error.strerror}") from error
