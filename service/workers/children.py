"""How child processes start and end.

A child's standard input is a socket, with the supervisor at its other end. The child reads its orders, keys included,
from the first line, because a command line can be read by everybody on the machine. Nothing else is written to it, and
its end means that the supervisor is gone. What comes back is a pulse: a byte a second, for as long as the child's event
loop runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import SecretStr

import service
from service.process.watchdog import LAST_WORDS_SECONDS, POLL_SECONDS, SILENT_POLLS
from service.settings import Settings

log = logging.getLogger(__name__)

CANNOT_START = 1
"""Exit status of a child that could not start: another one would not either."""
BAD_INPUT = 2
"""Exit status for bad settings: another child would fail with them too."""
ENGINE_FAILED = 3
"""Exit status of an engine that has run and failed: another one may not."""
CRASHED = 70
"""Exit status: a defect of ours."""

PULSE_SECONDS = 1.0
TELL = signal.SIGUSR2
"""Makes a child write to its log what each of its threads is doing, even where Python stands still."""

Role = Literal["engine", "worker"]


@dataclass(frozen=True)
class Orders:
    """What a child is told to do."""

    role: Role
    name: str
    socket: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, role: Role, name: str, socket: Path, settings: Settings) -> Orders:
        return cls(role, name, str(socket), {key: _plain(value) for key, value in settings})

    @property
    def child(self) -> str:
        """What the log calls it."""
        return f"{self.role} {self.name}".strip()

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: str) -> Orders:
        return cls(**json.loads(line))


def _environment() -> dict[str, str]:
    """The environment of a child. `-P` keeps it from importing from its current folder; if this package was imported
    from there, `PYTHONPATH` says so.
    """
    root, path = str(Path(service.__file__).parents[1]), os.environ.get("PYTHONPATH")
    if os.path.abspath(sys.path[0]) != root:
        return {**os.environ}
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def _plain(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value


class Child:
    """A child process, as the supervisor sees it. One that stands still is killed."""

    command: ClassVar[tuple[str, ...]] = (sys.executable, "-P", "-m", "service.workers")

    def __init__(self, orders: Orders, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self.name = orders.child
        self._process = process
        self._line = line
        self._poll_seconds = POLL_SECONDS if orders.settings["stuck_seconds"] else None
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(lambda _: line.close())

    @classmethod
    async def start(cls, orders: Orders) -> Child:
        """In a process group of its own, so that Ctrl-C at a terminal reaches the supervisor alone."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # Children start with SIGHUP blocked: workers never use it, and the engine only once it is up. The process has
        # been made when this first yields to the event loop, so that other children starting meanwhile do no harm.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            process = await asyncio.create_subprocess_exec(
                *cls.command, stdin=theirs.fileno(), process_group=0, env=_environment()
            )
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            theirs.close()
        with suppress(ConnectionError):  # it died at once, which its exit status will tell
            await asyncio.get_running_loop().sock_sendall(ours, orders.line())
        return cls(orders, process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status, or minus the number of the signal that killed it."""
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, seconds: float) -> None:
        """Ask it to end, and kill it if it has not after so many seconds."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            log.error("%s did not end in %g s: killing it", self.name, seconds)
            await self.kill()

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self._process.wait()

    async def _watch(self) -> None:
        """Until it ends. Before its first pulse a child imports, which takes its time."""
        silent, longest = 0, None
        with suppress(ConnectionError):
            while silent < SILENT_POLLS:
                try:
                    async with asyncio.timeout(longest):
                        if not await asyncio.get_running_loop().sock_recv(self._line, 4096):
                            return
                    silent, longest = 0, self._poll_seconds
                except TimeoutError:
                    silent += 1
            log.error("%s has stood still for %g s: killing it", self.name, POLL_SECONDS * SILENT_POLLS)
            self.send(TELL)
            await asyncio.sleep(LAST_WORDS_SECONDS)
            self.send(signal.SIGKILL)


def start_pulse() -> None:
    """In a child: tell the supervisor from now on that the event loop runs."""
    loop, line = asyncio.get_running_loop(), sys.stdin.fileno()
    os.set_blocking(line, False)

    def beat() -> None:
        with suppress(OSError):  # the supervisor stands still itself, or is gone
            os.write(line, b".")
        loop.call_later(PULSE_SECONDS, beat)

    beat()


def end_with_parent(stopped: asyncio.Event) -> asyncio.Event:
    """In a child: the end of standard input sets `stopped`, and the event that is returned, which nothing else sets."""
    loop, pipe, orphaned = asyncio.get_running_loop(), sys.stdin.fileno(), asyncio.Event()

    def look() -> None:
        try:
            heard = os.read(pipe, 4096)
        except ConnectionResetError:  # the parent died with pulses unread
            heard = b""
        if not heard:
            loop.remove_reader(pipe)
            orphaned.set()
            stopped.set()

    loop.add_reader(pipe, look)
    return orphaned
