"""A first-in first-out queue with two bounds, in requests and in tokens, that refuses at once.

A place is reserved before a request is tokenised and turned into a queued job afterwards, so that the
work of preparing requests is counted too and cannot pile up in front of the queue. Pure bookkeeping:
used from one thread, knows neither time nor futures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from service.errors import ResourceExhausted


class Sized(Protocol):
    @property
    def n_tokens(self) -> int: ...


class Place:
    """A reserved place. It is used up by the job that takes it, or freed unused."""

    def __init__(self) -> None:
        self.held = True


EntryT = TypeVar("EntryT", bound=Sized)


class BoundedQueue(Generic[EntryT]):
    """`len(queue)` counts reserved places and queued entries alike."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._entries: deque[EntryT] = deque()
        self._reserved = 0
        self.n_tokens = 0

    def __len__(self) -> int:
        return len(self._entries) + self._reserved

    def __iter__(self) -> Iterator[EntryT]:
        """Queued entries, longest waiting first."""
        return iter(tuple(self._entries))

    @property
    def n_queued(self) -> int:
        """Entries, without the reserved places."""
        return len(self._entries)

    @contextmanager
    def reserve(self) -> Iterator[Place]:
        """A place for one request. Raises `ResourceExhausted` when either bound has been reached."""
        if len(self) >= self._max_requests:
            raise ResourceExhausted(f"{self._max_requests} requests are waiting: try again later", "queue_requests")
        if self.n_tokens >= self._max_tokens:
            raise ResourceExhausted(f"{self.n_tokens} tokens are waiting: try again later", "queue_tokens")
        place = Place()
        self._reserved += 1
        try:
            yield place
        finally:
            self._give_up(place)

    def put(self, entry: EntryT, place: Place) -> None:
        """Queue an entry in its place. Raises `ResourceExhausted` when its tokens do not fit.

        An entry that would be the only one is taken whatever its size, or it could never be served.
        """
        self._give_up(place)
        if self._entries and self.n_tokens + entry.n_tokens > self._max_tokens:
            message = f"{self.n_tokens} tokens are waiting and {entry.n_tokens} more do not fit: try again later"
            raise ResourceExhausted(message, "queue_tokens")
        self._entries.append(entry)
        self.n_tokens += entry.n_tokens

    def put_back(self, entries: Sequence[EntryT]) -> None:
        """To the head of the queue, in this order. No bound applies: they were accepted before."""
        self._entries.extendleft(reversed(entries))
        self.n_tokens += sum(entry.n_tokens for entry in entries)

    def remove(self, entry: EntryT) -> bool:
        """Take an entry out of the queue; false if it was not in it."""
        if entry not in self._entries:
            return False
        self._entries.remove(entry)
        self.n_tokens -= entry.n_tokens
        return True

    def _give_up(self, place: Place) -> None:
        if place.held:
            place.held = False
            self._reserved -= 1
