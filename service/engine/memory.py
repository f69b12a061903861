"""Tells a shortage of memory from a defect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rdt_core.memory import shortage
from service.engine.backend import OutOfMemory

Value = TypeVar("Value")


def or_out_of_memory(compute: Callable[[], Value]) -> Value:
    """What `compute` returns. Raises `OutOfMemory` where it ran out of memory, and else what it raises."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        said = shortage(error)
        if said is None:
            raise
    raise OutOfMemory(said)  # outside of `except`: torch's error as its context would keep the tick's tensors
