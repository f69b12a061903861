"""The composition root: settings -> host of the model -> two listening servers, and back down.

The ports are bound first and the checkpoint loaded behind it, so that probes get true answers from the
start. On SIGTERM or SIGINT new requests are refused, accepted ones finish within the grace period, and
the process ends with 0. A checkpoint that cannot be loaded ends it with 1. SIGHUP reloads the checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn
from pydantic import SecretStr

from service.errors import ServiceError
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.settings import Settings
from service.tracing import open_tracer

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""How long slow callers may take to read their answers once the engine has finished."""


class Runtime:
    """One server: what it is made of, before and after its model is there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(time.monotonic)
        self.tracer = open_tracer(settings.otel_endpoint)
        self.host = Host(settings, self.lifecycle, self.metrics, self.tracer)
        parts, n_bytes = (self.lifecycle, self.metrics), settings.max_body_bytes
        api_key, admin_key = _secret(settings.api_key), _secret(settings.admin_key)
        self.app = create_app(
            *parts, max_body_bytes=n_bytes, api_key=api_key, admin_key=admin_key, reload=self.host.reload,
            tracer=self.tracer,
        )  # fmt: skip
        self.rpc = RpcServer(*parts, max_message_bytes=n_bytes, api_key=api_key, tracer=self.tracer)


async def serve(settings: Settings) -> int:
    """Run until a signal comes. Returns the exit status; raises `OSError` if the address cannot be had."""
    stopped = _signalled()
    runtime = Runtime(settings)
    _on_hangup(runtime.host, stopped)
    with listen(settings.host, settings.http_port) as listener:
        await runtime.rpc.start(settings.host, settings.grpc_port)
        log.info("listening on http://%s:%d", *listener.getsockname()[:2])
        log.info("listening on grpc://%s:%d", settings.host, runtime.rpc.port)
        server = _Server(
            uvicorn.Config(
                runtime.app, log_config=None, access_log=False, lifespan="off", ws="none",
                server_header=False, timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )  # fmt: skip
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        status = await _load_and_wait(runtime.host, stopped)
        await runtime.host.drain(settings.grace_seconds)
        server.should_exit = True
        await asyncio.gather(answering, runtime.rpc.stop(FLUSH_SECONDS))
        await runtime.host.stop()
    await asyncio.to_thread(runtime.tracer.close)
    return status


def listen(host: str, port: int) -> socket.socket:
    """Raises `OSError` naming the address.

    Accepted connections send at once (they inherit the option): an answer is a head and a body, and with
    Nagle's algorithm the body of every second one would wait 40 ms for the caller's acknowledgement.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _signalled() -> asyncio.Event:
    """Set once the process has been asked to end."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def _on_hangup(host: Host, stopped: asyncio.Event) -> None:
    """SIGHUP asks for the checkpoint file to be taken in again, or says that the terminal has gone, and ends us."""
    in_terminal = _has_terminal()
    reloads: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        if in_terminal and not _has_terminal():
            stopped.set()
            return
        reloads.add(task := asyncio.create_task(_reload(host)))
        task.add_done_callback(reloads.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _load_and_wait(host: Host, stopped: asyncio.Event) -> int:
    """Until a signal comes (0), loading fails or the engine gives up (1)."""
    stopping = asyncio.create_task(stopped.wait())
    loading = asyncio.create_task(host.load())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and (error := loading.exception()) is not None:
        log.debug("loading failed", exc_info=error)
        print(f"rdt-serve: cannot start: {error}", file=sys.stderr)
        stopping.cancel()
        return 1
    if not stopped.is_set():
        failing = asyncio.create_task(host.failed.wait())
        await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
    stopping.cancel()
    loading.cancel()
    if not stopped.is_set():
        log.critical("the engine has failed twice in a minute: ending the process")
        return 1
    log.info("draining")
    return 0


async def _reload(host: Host) -> None:
    """What SIGHUP asks for. The host has logged what became of it, but for a time when nothing can be reloaded."""
    try:
        change = await host.reload()
    except ServiceError as error:
        log.warning("no reload: %s", error.message)
    else:
        log.info("reload: %s", change.outcome)


def _secret(key: SecretStr | None) -> str | None:
    return None if key is None else key.get_secret_value()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield
