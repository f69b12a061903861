"""What is said where memory runs out: which setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rdt_core.memory import shortage
from training.config import ConfigError, one_line

LOST_WORKER = "DataLoader worker (pid"
"""What torch says of one that was killed, by the system most often; of an error in one it says where it was caught."""


class OutOfMemory(ConfigError):
    """The batches are too large for this machine."""


@contextmanager
def enough_memory(setting: str, batch_size: int, length: str, n_workers: int = 0) -> Iterator[None]:
    """Around work on batches of this size, whose setting is named, and that of their texts' length, and which so many
    processes prepare.

    Raises `OutOfMemory` where there is not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError, EOFError) as error:
        if LOST_WORKER in str(error) or isinstance(error, EOFError):
            wanted = "one was lost, perhaps for lack of memory, want less"
            raise OutOfMemory(f"data.num_workers is {n_workers}: {wanted}: {one_line(error) or 'no answer'}") from error
        if (said := shortage(error)) is None:
            raise
        wanted = f"memory has run out, want less, or a smaller {length}"
        raise OutOfMemory(f"{setting} is {batch_size}: {wanted}: {one_line(said)}") from error
