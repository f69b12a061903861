"""What is said where memory runs out: which setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rdt_core.memory import shortage
from training.config import ConfigError, one_line


class OutOfMemory(ConfigError):
    """The batches are too large for this machine."""


@contextmanager
def enough_memory(setting: str, batch_size: int, length: str) -> Iterator[None]:
    """Around work on batches of this size, whose setting is named, and that of their texts' length.

    Raises `OutOfMemory` where there is not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (said := shortage(error)) is None:
            raise
        wanted = f"memory has run out, want less, or a smaller {length}"
        raise OutOfMemory(f"{setting} is {batch_size}: {wanted}: {one_line(said)}") from error
