from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from service.process import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_alive_is_not_looked_through_again_and_what_is_dead_does_not_stay() -> None:
    kept, dead = Knot(), weakref.ref(Knot())
    garbage.freeze()
    assert not any(each is kept for each in gc.get_objects())
    assert dead() is None


def test_new_objects_are_still_looked_through_but_less_often() -> None:
    garbage.freeze()
    assert gc.isenabled()
    assert gc.get_threshold()[0] == garbage.NEW_OBJECTS > 2000, "what Python has from 3.13 on"
    Knot()
    assert gc.collect() > 0
