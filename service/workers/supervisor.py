"""The process that was started: it holds the ports, receives the signals, and restarts the other processes.

A worker or an engine that dies is replaced. The server ends if two engines die within a minute, or if workers die too
often. When it is asked to end, the workers finish what they have accepted first, and then the engine ends.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.engine.engine import FATAL_WINDOW_SECONDS
from service.process.addresses import address, bound, cannot_listen
from service.process.signals import asked_to_end, on_hangup
from service.process.watchdog import watch_event_loop
from service.settings import Settings
from service.workers.children import BAD_INPUT, CANNOT_START, CRASHED, Child, Orders, Role

log = logging.getLogger(__name__)

MAX_WORKER_DEATHS = 10
"""More deaths in a minute end the server: whatever is wrong, new processes do not cure it."""
MAX_CRASHES = 3
"""The server ends if the same worker crashes so many times in a row soon after its start: that is a defect."""
MAX_STARTS = 20
"""How often to try to start a child when the machine has no room for a process."""
PAUSE_SECONDS = 0.5
"""Before a worker is replaced, and before the next try to start a child."""
LINGERING_SECONDS = 70.0
"""How long to wait for connections that a server before this one has closed: the system keeps them for up to 62 s."""
POLL_SECONDS = 0.2
"""How often it is tried whether the port is free again."""
MARGIN_SECONDS = 10.0
"""How long a child may take to end, beyond the grace period of its requests."""
MAX_SOCKET_PATH = 103
"""Bytes in the path of a Unix socket, as the strictest system has it (macOS; Linux allows 107)."""


async def supervise(settings: Settings) -> int:
    """Run with ports that are `reserved`, until a signal comes. Returns the exit status.

    Raises `OSError` if the folder for temporary files is of no use.
    """
    stopped = asked_to_end()
    if settings.stuck_seconds:
        watch_event_loop()
    with tempfile.TemporaryDirectory(prefix="rdt-") as folder:
        crew = Crew(settings, _socket_in(folder))
        on_hangup(crew.reload, stopped)
        try:
            return await crew.work(stopped)
        finally:
            await crew.kill()


class Crew:
    """The engine's process and the workers."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self._settings = settings
        self._path = path
        self._engine: Child | None = None
        self._workers: dict[int, Child] = {}  # by slot
        self._deaths: deque[float] = deque(maxlen=MAX_WORKER_DEATHS)

    async def work(self, stopped: asyncio.Event) -> int:
        """Run until asked to end (0), or until it cannot go on. Returns the exit status."""
        slots = range(self._settings.api_workers)
        keepers = [asyncio.create_task(self._keep_engine()), *(asyncio.create_task(self._keep(slot)) for slot in slots)]
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait([*keepers, stopping], return_when=asyncio.FIRST_COMPLETED)
        status = 0 if stopped.is_set() else next(_status_of(keeper) for keeper in keepers if keeper.done())
        for task in (*keepers, stopping):
            task.cancel()
        await asyncio.gather(*keepers, stopping, return_exceptions=True)
        if status == 0:
            log.info("draining")
        await self._end()
        return status

    def reload(self) -> None:
        if self._engine is not None:
            self._engine.send(signal.SIGHUP)

    async def kill(self) -> None:
        """Kill all children that are left."""
        for child in self._children:
            await child.kill()

    @property
    def _children(self) -> list[Child]:
        return [*self._workers.values(), *([] if self._engine is None else [self._engine])]

    async def _end(self) -> None:
        seconds = self._settings.grace_seconds + MARGIN_SECONDS
        await asyncio.gather(*(worker.end(seconds) for worker in self._workers.values()))
        if self._engine is not None:
            await self._engine.end(MARGIN_SECONDS)

    async def _keep_engine(self) -> int:
        """Restart it whenever it ends. Returns the exit status when there is no point in another one."""
        died = float("-inf")
        while True:
            self._engine = await self._start("engine", "")
            status = await self._engine.wait()
            if status in (CANNOT_START, BAD_INPUT):
                return status
            now = time.monotonic()
            if now - died < FATAL_WINDOW_SECONDS:
                log.critical("the engine's process has ended twice in a minute: ending the server")
                return 1
            log.error("the engine's process has ended (%s): starting it anew", _fate(status))
            died = now

    async def _keep(self, slot: int) -> int:
        """The same for the worker of this slot."""
        n_before = n_crashes = 0
        while True:
            born = time.monotonic()
            self._workers[slot] = worker = await self._start("worker", f"{slot}.{n_before}")
            status = await worker.wait()
            if status in (CANNOT_START, BAD_INPUT):
                return status
            now = time.monotonic()
            n_crashes = n_crashes + 1 if status == CRASHED and now - born < FATAL_WINDOW_SECONDS else 0
            if n_crashes == MAX_CRASHES:
                log.critical("%s has crashed %d times in a row: ending the server", worker.name, n_crashes)
                return 1
            if len(self._deaths) == MAX_WORKER_DEATHS and now - self._deaths[0] < FATAL_WINDOW_SECONDS:
                log.critical("more than %d workers have ended in a minute: ending the server", MAX_WORKER_DEATHS)
                return 1
            self._deaths.append(now)
            log.error("%s has ended (%s): starting another", worker.name, _fate(status))
            n_before += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def _start(self, role: Role, name: str) -> Child:
        child = await self._start_when_possible(Orders.of(role, name, self._path, self._settings))
        log.info("started %s as process %d", child.name, child.pid)
        return child

    async def _start_when_possible(self, orders: Orders) -> Child:
        """Raises `OSError` if there is no room for a process after many tries."""
        for _ in range(MAX_STARTS - 1):
            try:
                return await Child.start(orders)
            except OSError as error:
                log.error("%s cannot be started: %s", orders.child, error)
                await asyncio.sleep(PAUSE_SECONDS)
        return await Child.start(orders)


def _status_of(keeper: asyncio.Task[int]) -> int:
    """The exit status, once somebody cannot be kept alive any more."""
    if (error := keeper.exception()) is None:
        return keeper.result()
    log.critical("no process can be started: ending the server: %s", error)
    return 1


def _socket_in(folder: str) -> Path:
    path = Path(folder) / "engine"
    if (length := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise OSError(f"TMPDIR: {path} has {length} bytes: the path of a socket may have {MAX_SOCKET_PATH}")
    return path


@contextmanager
def reserved(settings: Settings) -> Iterator[Settings]:
    """The settings with ports that stay reserved inside the block. Raises `OSError` naming the address.

    The sockets that reserve them do not listen, so connections go to workers only.
    """
    with _holder(settings.host, settings.http_port) as http, _holder(settings.host, settings.grpc_port) as grpc:
        ports = {"http_port": http.getsockname()[1], "grpc_port": grpc.getsockname()[1]}
        yield settings.model_copy(update=ports)


def _holder(host: str, port: int) -> socket.socket:
    """A bound socket. First bound without sharing, because another server that shares the port would get some of the
    connections.
    """
    try:
        with bound(host, port) as alone:
            port = alone.getsockname()[1]
        return _bound_once_free(host, port)
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def _bound_once_free(host: str, port: int) -> socket.socket:
    """Bound with sharing. Closed connections of an earlier server that did not share may block the port for a while."""
    ends_at = None
    while True:
        try:
            return bound(host, port, share=True)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or (ends_at is not None and time.monotonic() > ends_at):
                raise
        if ends_at is None:
            ends_at = time.monotonic() + LINGERING_SECONDS
            where = address(host, port)
            log.warning("waiting for what a server before this one has left of its connections at %s", where)
        time.sleep(POLL_SECONDS)


def _fate(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {-status}"
