"""When Python's cyclic garbage collector runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 20_000
"""Threshold of the youngest generation: so many more objects made than freed start a collection. Python's own 700 are
reached every other request or so, which costs a tenth of a request's time; from 3.13 on they are 2000."""


def freeze() -> None:
    """Exempt all objects that are alive now: a full collection over a model and its libraries would delay every request
    by 0.2 s. Call it before the first request: what requests hold would never be freed, nor their model.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])


@contextmanager
def left_alone() -> Iterator[None]:
    """No collection meanwhile, in any thread."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
