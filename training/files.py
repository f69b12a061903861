"""Output: folders are checked before the work begins, and files are written as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile

from training.config import ConfigError


def make_folder(path: Path, named: str) -> None:
    """Make the folder if need be. Raises `ConfigError`, with the setting called `named`, if it takes no files."""
    if path.parts[:1] == ("~",):  # no shell expands it inside a setting, and who removed that folder might remove more
        raise ConfigError(f"{named} is {str(path)!r}: ~ does not stand for anything here, want the path in full")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{named} is {str(path)!r}: want a folder to write in: {error.strerror}") from error


def write_whole(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each file under a temporary name with its suffix; once all are complete, rename them in order.

    An error before that leaves the old files as they were. Raises `OSError`, which names the file.
    """
    partial = {path: path.with_name(f".{os.getpid()}.partial.{path.name}") for path in writers}
    try:
        for path, write in writers.items():
            try:
                write(partial[path])
            except OSError as error:  # that of a full disk does not name the file
                raise OSError(f"{path}: cannot be written: {error}") from error
        for path in writers:
            partial[path].replace(path)
    finally:
        for left in partial.values():
            left.unlink(missing_ok=True)
