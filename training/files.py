"""Folders that must take files, found out before the work; and files that are written as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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


def write_whole(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Have each file written under another name with its suffix; once all are whole they take their places, in order.

    What goes wrong before that leaves the old files as they were. Raises `OSError`, which names the file.
    """
    partial = {path: path.with_name(f".{os.getpid()}.partial.{path.name}") for path in writers}
    try:
        for path, write in writers.items():
            try:
                write(partial[path])
            except OSError as error:  # of a full disk it names none
                raise OSError(f"{path}: cannot be written: {error}") from error
        for path in writers:
            partial[path].replace(path)
    finally:
        for left in partial.values():
            left.unlink(missing_ok=True)
