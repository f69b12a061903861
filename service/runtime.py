"""The composition root: settings -> host of the model -> two listening servers, and back down.

The ports are bound first and the checkpoint is loaded after that, so that probes get true answers from the
start. On SIGTERM or SIGINT new requests are refused, accepted ones finish within the grace period, and
the process ends with 0. A checkpoint that cannot be loaded ends it with 1. SIGHUP reloads the checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import uvicorn

from service.errors import FailedPrecondition, Unavailable
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.process import logs
from service.process.addresses import address, cannot_listen, family
from service.process.signals import asked_to_end, on_hangup
from service.process.watchdog import watch_event_loop
from service.rest.app import create_app
from service.rest.protocol import IDLE_SECONDS, Http
from service.rest.reload import Change
from service.rpc.server import RpcServer
from service.settings import Settings, secret
from service.tracing import Tracer
from service.tracing.opening import open_tracer

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""How long slow callers may take to read their answers once the engine has finished."""


class FrontEnd:
    """The two listening servers over a lifecycle, wherever the engine behind it computes."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
        tracer: Tracer,
        reload: Callable[[], Awaitable[Change]],
        *,
        share_port: bool = False,
    ) -> None:
        self._settings = settings
        n_bytes = settings.max_body_bytes
        api_key, admin_key = secret(settings.api_key), secret(settings.admin_key)
        self.app = create_app(
            lifecycle, metrics, max_body_bytes=n_bytes, api_key=api_key, admin_key=admin_key, reload=reload,
            tracer=tracer,
        )  # fmt: skip
        self.rpc = RpcServer(
            lifecycle, metrics, max_message_bytes=n_bytes, api_key=api_key, tracer=tracer, share_port=share_port
        )
        self._server = _Server(
            uvicorn.Config(
                self.app, http=Http, log_config=None, access_log=False, lifespan="off", ws="none",
                server_header=False, proxy_headers=False, timeout_graceful_shutdown=FLUSH_SECONDS,
                timeout_keep_alive=IDLE_SECONDS,
            )
        )  # fmt: skip
        self._answering: asyncio.Task[None] | None = None

    async def open(self, listener: socket.socket) -> None:
        """Raises `OSError` if the gRPC address cannot be bound."""
        settings = self._settings
        await self.rpc.start(settings.host, settings.grpc_port)
        log.info("listening on http://%s", address(*listener.getsockname()[:2]))
        log.info("listening on grpc://%s", address(settings.host, self.rpc.port))
        self._answering = asyncio.create_task(self._server.serve(sockets=[listener]))

    def part(self) -> None:
        """Send callers elsewhere, as far as the transports can, while accepted requests are finished."""
        self.rpc.part()

    async def close(self) -> None:
        """Take no more connections; callers get some seconds to read their answers."""
        self._server.should_exit = True
        answering = () if self._answering is None else (self._answering,)
        await asyncio.gather(*answering, self.rpc.stop(FLUSH_SECONDS))


class Runtime:
    """The parts of a server in one process."""

    def __init__(self, settings: Settings) -> None:
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(time.monotonic)
        self.tracer = open_tracer(settings.otel_endpoint)
        self.host = Host(settings, self.lifecycle, self.metrics, self.tracer)
        self.front = FrontEnd(settings, self.lifecycle, self.metrics, self.tracer, self.host.reload)


async def serve(settings: Settings) -> int:
    """Run until a signal comes. Returns the exit status; raises `OSError` if the address cannot be bound."""
    stopped = asked_to_end()
    if settings.stuck_seconds:
        watch_event_loop()
    runtime = Runtime(settings)
    on_hangup(Reloader(runtime.host), stopped)
    with listen(settings.host, settings.http_port) as listener:
        await runtime.front.open(listener)
        status = await load_and_wait(runtime.host, stopped)
        runtime.front.part()
        await runtime.host.drain(settings.grace_seconds)
        await runtime.front.close()
        await runtime.host.stop()
    await asyncio.to_thread(runtime.tracer.close)
    return status


def listen(host: str, port: int, *, share: bool = False) -> socket.socket:
    """Raises `OSError` naming the address. With `share`, others that share it get some of its connections.

    Accepted connections send at once (they inherit the option): an answer is a head and a body, and with
    Nagle's algorithm the body of every second one would wait 40 ms for the caller's acknowledgement.
    """
    try:
        listener = socket.create_server(
            (host, port), family=family(host), backlog=2048, reuse_port=share, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        raise cannot_listen(host, port, error) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Reloader:
    """What SIGHUP calls. Its sender gets no answer and will not ask again, so a signal during a reload leads to one
    more afterwards: the one under way may have read the file before it was written.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._asked = False
        self._answering: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        self._asked = True
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer())

    async def _answer(self) -> None:
        while self._asked:
            await self._host.at_rest()
            self._asked = False
            await _reload(self._host)


async def load_and_wait(host: Host, stopped: asyncio.Event) -> int:
    """Until a signal comes (0), loading fails or the engine gives up (1)."""
    stopping = asyncio.create_task(stopped.wait())
    loading = asyncio.create_task(host.load())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and (error := loading.exception()) is not None:
        log.debug("loading failed", exc_info=error)
        logs.complain("rdt-serve", f"cannot start: {error}")
        stopping.cancel()
        return 1
    if not stopped.is_set():
        failing = asyncio.create_task(host.failed.wait())
        await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
    stopping.cancel()
    loading.cancel()
    if not stopped.is_set():
        log.critical("the engine has failed: ending the process")
        return 1
    log.info("draining")
    return 0


async def _reload(host: Host) -> None:
    """Reload at rest, without a caller."""
    try:
        change = await host.reload()
    except FailedPrecondition:
        pass  # a file that cannot be served: the host has logged why
    except Unavailable as error:
        log.warning("no reload: %s", error.message)
    else:
        log.info("reload: %s", change.outcome)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield
