"""When Python collects garbage, that is, looks for cycles of objects that nothing refers to any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 20_000
"""As many more made than freed before the youngest are looked through. Python's own 700 are reached every other
request or so, which costs a tenth of its time."""


def freeze() -> None:
    """Whatever is alive now stays: a full collection over a model and its libraries would hold every request up for
    0.2 s. To be called before the first request: what requests hold then would stay for ever, and their model with it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])


@contextmanager
def left_alone() -> Iterator[None]:
    """Nothing is collected meanwhile, by whichever thread."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
