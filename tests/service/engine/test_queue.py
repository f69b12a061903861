"""The two bounds of the line, what counts against them, and its order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from service.engine.queue import BoundedQueue
from service.errors import ResourceExhausted


@dataclass(eq=False)
class Item:
    n_tokens: int


@pytest.fixture
def queue() -> BoundedQueue[Item]:
    return BoundedQueue(max_requests=3, max_tokens=10)


def put(queue: BoundedQueue[Item], n_tokens: int) -> Item:
    item = Item(n_tokens)
    with queue.reserve() as place:
        queue.put(item, place)
    return item


def test_a_place_is_refused_once_the_tokens_are_all_taken(queue: BoundedQueue[Item]) -> None:
    put(queue, 4)
    put(queue, 6)
    with pytest.raises(ResourceExhausted, match="10 tokens are waiting") as refused, queue.reserve():
        pass
    assert refused.value.reason == "queue_tokens"
    assert len(queue) == 2, "a refused caller holds no place"


def test_one_token_left_is_reason_enough_to_reserve_and_one_too_many_to_refuse(queue: BoundedQueue[Item]) -> None:
    put(queue, 9)
    with pytest.raises(ResourceExhausted, match="9 tokens are waiting and 2 more do not fit"):
        put(queue, 2)
    put(queue, 1)
    assert (len(queue), queue.n_tokens) == (2, 10)


def test_who_leaves_gives_back_the_tokens_once(queue: BoundedQueue[Item]) -> None:
    first, second = put(queue, 3), put(queue, 4)
    assert queue.remove(second)
    assert queue.n_tokens == 3
    assert not queue.remove(second), "it is gone already"
    assert queue.n_tokens == 3
    assert list(queue) == [first]


def test_what_comes_back_goes_to_the_head_in_its_order_and_past_the_bounds(queue: BoundedQueue[Item]) -> None:
    waiting = [put(queue, 4), put(queue, 4)]
    again = [Item(5), Item(6)]
    queue.put_back(again)
    assert list(queue) == [*again, *waiting]
    assert (queue.n_queued, queue.n_tokens) == (4, 19)


def test_entries_may_leave_while_the_line_is_looked_through(queue: BoundedQueue[Item]) -> None:
    items = [put(queue, 1) for _ in range(3)]
    seen = []
    for item in queue:
        seen.append(item)
        queue.remove(item)
    assert seen == items
    assert len(queue) == 0
