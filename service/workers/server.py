"""The engine's end of the connections: jobs in, results out, and what the workers need to know.

When a connection ends, everything that its worker has asked for is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from service.engine.protocol import Clock
from service.engine.types import Reading
from service.errors import Internal, ServiceError
from service.hosting import Change
from service.metrics import Occupancy
from service.workers.messages import (
    Adopted,
    Answered,
    Cancel,
    Failed,
    Hello,
    Leave,
    Message,
    Pass,
    Reload,
    Reloaded,
    Report,
    ReportWanted,
    Scrape,
    Scraped,
    Status,
    Submit,
)
from service.workers.metering import Ledger
from service.workers.models import Models
from service.workers.wire import Wire

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.02
"""How often workers get the status of the queue, if it has changed."""
BASE_SECONDS = 1.0
"""How often workers get the engine's counters, to keep them should it die."""


class Host(Occupancy, Protocol):
    """What is used of `service.hosting.Host`."""

    async def reload(self) -> Change: ...


class Peer:
    """A connected worker, and the tasks that answer it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.name = ""  # until it has said hello
        self.adopted = ""
        self.leaves = False  # because it was asked to end
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def abort(self) -> None:
        self.wire.abort()


class EngineServer:
    """Listens on a Unix socket; the permissions of its folder decide who may connect."""

    def __init__(self, ledger: Ledger, clock: Clock = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._peers: dict[Wire, Peer] = {}
        self.models = Models(self._peers.values, self._tell_all)
        self._reloads: set[asyncio.Task[None]] = set()
        self._told: Status | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._host: Host
        self._listener: asyncio.Server

    async def start(self, path: Path, host: Host) -> None:
        self._host = host
        self._listener = await asyncio.get_running_loop().create_unix_server(self._connection, str(path))
        self._tasks = [asyncio.create_task(self._tell_status()), asyncio.create_task(self._tell_base())]

    async def left(self, grace_seconds: float) -> None:
        """Returns when all workers have left, or after the grace period."""
        try:
            await asyncio.wait_for(self._empty.wait(), grace_seconds)
        except TimeoutError:
            log.warning("grace period of %g s is over: %d workers are left", grace_seconds, len(self._peers))

    async def stop(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.wire.close()
        await asyncio.sleep(0)

    def _connection(self) -> Wire:
        wire = Wire(self._heard, self._ended)
        self._peers[wire] = Peer(wire)
        self._empty.clear()
        return wire

    def _ended(self, wire: Wire) -> None:
        peer = self._peers.pop(wire)
        for task in peer.tasks.values():
            task.cancel()
        if peer.name:
            self._ledger.depart(peer.name, lost=not peer.leaves)
        if not self._peers:
            self._empty.set()

    def _heard(self, wire: Wire, message: Message) -> None:
        peer = self._peers[wire]
        match message:
            case Submit():
                self._begin(peer, message.id, self._compute(peer, message))
            case Cancel():
                if (task := peer.tasks.get(message.id)) is not None:
                    task.cancel()
            case Report():
                self._ledger.book(peer.name, message)
            case Leave():
                peer.leaves = True
            case Adopted():
                peer.adopted = message.digest
            case Scrape():
                self._begin(peer, message.id, self._scrape(peer, message))
            case Reload():
                task = asyncio.create_task(self._reload(peer, message))  # goes on if the worker leaves
                self._reloads.add(task)
                task.add_done_callback(self._reloads.discard)
            case Hello():
                peer.name = message.worker
                self._ledger.inherit(message)
                if self.models.serving is not None:
                    wire.send(self.models.serving)
                wire.send(self._status())
                wire.send(ReportWanted(self._ledger.asked))  # a scrape may be waiting for this worker

    def _begin(self, peer: Peer, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = peer.tasks[number] = asyncio.create_task(work)
        task.add_done_callback(lambda _: peer.tasks.pop(number, None))

    async def _compute(self, peer: Peer, submit: Submit) -> None:
        def tell(reading: Reading) -> None:
            peer.wire.send(Pass(submit.id, reading))

        async def answer() -> Answered:
            left = submit.seconds_left
            job = submit.job if left is None else replace(submit.job, deadline=self._clock() + left)
            engine = self.models.engine(submit.digest)
            with engine.reserve() as place:
                return Answered(submit.id, await engine.submit(job, place, tell if submit.watched else None))

        await _respond(peer, submit.id, answer)

    async def _reload(self, peer: Peer, asked: Reload) -> None:
        async def reloaded() -> Reloaded:
            change = await self._host.reload()
            await self.models.adoption()
            return Reloaded(asked.id, change.outcome, change.previous, change.model)

        await _respond(peer, asked.id, reloaded)

    async def _scrape(self, peer: Peer, asked: Scrape) -> None:
        exposition = await self._ledger.total({each.name: each.wire for each in self._peers.values() if each.name})
        self._tell_all(self._ledger.base())  # before it is shown: a later engine must not show less
        peer.wire.send(Scraped(asked.id, exposition))

    def _status(self) -> Status:
        return Status(self.models.state, self._host.waiting, self._host.waiting_tokens)

    async def _tell_status(self) -> None:
        while True:
            if (status := self._status()) != self._told:
                self._told = status
                self._tell_all(status)
            await asyncio.sleep(STATUS_SECONDS)

    async def _tell_base(self) -> None:
        while True:
            self._tell_all(self._ledger.base())
            await asyncio.sleep(BASE_SECONDS)

    def _tell_all(self, message: Message) -> None:
        for peer in self._peers.values():
            peer.wire.send(message)


async def _respond(peer: Peer, number: int, work: Callable[[], Awaitable[Message]]) -> None:
    """Send the answer, or the error."""
    try:
        response = await work()
    except ServiceError as error:
        response = Failed(number, error.with_traceback(None))  # it would lead back here, and keep the job
    except Exception:
        log.exception("what a worker asked for failed")
        response = Failed(number, Internal())
    peer.wire.send(response)
