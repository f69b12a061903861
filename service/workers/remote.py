"""The engine as a worker sees it: an `Engine` like any other, at the other end of a connection.

`Link` connects to the engine, and when that has died, to the next one; whoever was waiting gets an error at once.
`RemoteEngine` is one model of the engine on one connection, and is of no use after either has gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from service.engine.protocol import OnReading, show
from service.engine.queue import BoundedQueue, Place, Sized
from service.engine.types import Job, Reading, Result
from service.errors import Internal, ResourceExhausted, ServiceError, Unavailable
from service.workers.messages import (
    Answered,
    Base,
    Cancel,
    Failed,
    Hello,
    Message,
    Pass,
    Reloaded,
    Scraped,
    Serving,
    Status,
    Submit,
)
from service.workers.wire import Wire

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=Message)

RECONNECT_SECONDS = 0.05
"""How often it is tried to connect while there is no engine."""
POLL_SECONDS, SILENT_POLLS = 5.0, 3
"""The engine says something every second. One that was silent through so many polls does not compute either."""
NO_ENGINE = Status("failed", 0, 0)


class Asked:
    """A question to the engine that has no answer yet."""

    def __init__(self, on_reading: OnReading | None) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._on_reading = on_reading

    def show(self, reading: Reading) -> None:
        if self._on_reading is None or self.answer.done():
            return
        if (error := show(reading, self._on_reading)) is not None:  # must not break the connection, which all share
            self.end(error)

    def end(self, end: Message | ServiceError) -> None:
        if self.answer.done():  # a caller who left has cancelled it
            return
        if isinstance(end, ServiceError):
            self.answer.set_exception(end)
        else:
            self.answer.set_result(end)


class Link:
    """A worker's connection to the engine. `hear` gets all messages but answers, with the connection they came on."""

    def __init__(self, path: Path, worker: str, hear: Callable[[Wire, Message], None]) -> None:
        self._path = path
        self._worker = worker
        self._hear = hear
        self._ids = count(1)
        self._asked: dict[int, Asked] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._base = Base("", {})
        self._lost = asyncio.Event()
        self._spoken = False  # since the last poll
        self.wire: Wire | None = None
        self.status = NO_ENGINE
        self.draining = False

    async def run(self) -> None:
        """Keep the connection, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, wire = await loop.create_unix_connection(lambda: Wire(self._heard, self._ended), str(self._path))
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            self._lost.clear()
            self.wire = wire
            wire.send(Hello(self._worker, self._base.engine, self._base.counters))
            await self._watch(wire)

    async def _watch(self, wire: Wire) -> None:
        """Until the connection ends; it is cut where the engine at its other end stands still."""
        silent = 0
        while not self._lost.is_set():
            self._spoken = False
            with suppress(TimeoutError):  # and not `wait_for`, which before Python 3.12 may lose a cancellation
                async with asyncio.timeout(POLL_SECONDS):
                    await self._lost.wait()
            silent = 0 if self._spoken else silent + 1
            if silent == SILENT_POLLS:  # polls, not seconds: this process may have stood still itself
                log.error("the engine has said nothing for %g s", POLL_SECONDS * SILENT_POLLS)
                wire.abort()

    async def ask(
        self, question: Callable[[int], Message], kind: type[Reply], on_reading: OnReading | None = None
    ) -> Reply:
        """The answer, of this kind. Raises the error that came instead, and `Unavailable` when the engine is lost.

        Cancelling the wait cancels the work in the engine.
        """
        if self.wire is None:
            raise Unavailable.restarting()
        number, wire = next(self._ids), self.wire
        asked = self._asked[number] = Asked(on_reading)
        self._idle.clear()
        wire.send(question(number))
        try:
            answer = await asked.answer
        finally:
            if self._asked.pop(number, None) is not None:
                wire.send(Cancel(number))
                self._note_idle()
            del asked  # an error in it leads back here by its traceback, and with it all of the request would stay
        if not isinstance(answer, kind):
            raise Internal("the engine answered something else")
        return answer

    async def drain(self, grace_seconds: float) -> None:
        self.draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("grace period of %g s is over: %d requests are left", grace_seconds, len(self._asked))
            for number, asked in tuple(self._asked.items()):
                asked.end(Unavailable.shut_down())
                self.send(Cancel(number))
            self._asked.clear()

    def send(self, message: Message) -> None:
        if self.wire is not None:
            self.wire.send(message)

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()

    def _heard(self, wire: Wire, message: Message) -> None:
        self._spoken = True
        if isinstance(message, Pass):
            asked = self._asked.get(message.id)
            if asked is not None:
                asked.show(message.reading)
        elif isinstance(message, Answered | Failed | Reloaded | Scraped):
            asked = self._asked.pop(message.id, None)
            self._note_idle()
            if asked is not None:
                asked.end(message.error if isinstance(message, Failed) else message)
        elif isinstance(message, Status):
            self.status = message
        elif isinstance(message, Base):
            self._base = message
        else:
            self._hear(wire, message)

    def _ended(self, _wire: Wire) -> None:
        if not self.draining:
            level = logging.ERROR if self._asked else logging.WARNING
            log.log(level, "the connection to the engine is lost, and with it %d requests", len(self._asked))
        self.wire, self.status = None, NO_ENGINE
        for asked in self._asked.values():
            asked.end(Unavailable("the engine was lost before it answered: send the request again", "failed"))
        self._asked.clear()
        self._note_idle()
        self._lost.set()

    def _note_idle(self) -> None:
        if not self._asked:
            self._idle.set()


class QueueView(BoundedQueue[Sized]):
    """The engine's queue by its last `Status`, and places for requests that are being prepared here.

    It refuses before any work is done on a request. The engine may still refuse what passes here.
    """

    def __init__(self, link: Link, max_requests: int, max_tokens: int) -> None:
        super().__init__(max_requests, max_tokens)
        self._link = link

    def __len__(self) -> int:
        return super().__len__() + self._link.status.waiting

    def place(self) -> AbstractContextManager[Place]:
        self.n_tokens = self._link.status.waiting_tokens
        return self.reserve()

    def leave(self, place: Place) -> None:
        self._give_up(place)


class RemoteEngine:
    """One model of the engine, on the connection that announced it."""

    def __init__(self, link: Link, wire: Wire, serving: Serving, queue: QueueView) -> None:
        self._link = link
        self._wire = wire
        self._digest = serving.digest
        self._queue = queue

    @property
    def ready(self) -> bool:
        link = self._link
        return self._wire is link.wire and link.status.state == "ready" and not link.draining

    def reserve(self) -> AbstractContextManager[Place]:
        self._check_ready()
        if self._wire.crowded:
            raise ResourceExhausted("the engine is behind: try again later", "queue_requests")
        return self._queue.place()

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        self._check_ready()
        self._queue.leave(place)
        seconds_left = None if job.deadline is None else job.deadline - time.monotonic()
        watched = on_reading is not None
        answer = await self._link.ask(
            lambda number: Submit(number, self._digest, job, seconds_left, watched), Answered, on_reading
        )
        return answer.result

    def _check_ready(self) -> None:
        if self._link.draining:
            raise Unavailable.draining()
        if not self.ready:
            raise Unavailable.restarting()
