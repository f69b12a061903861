"""Puts the gRPC interface together: the denoiser, health and reflection on one port."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from service.access import ApiKey
from service.lifecycle import Lifecycle
from service.limits import MAX_TIMEOUT_MS
from service.metrics import Metrics
from service.process.addresses import address, bound, cannot_listen
from service.rpc.access import Door
from service.rpc.arrival import METADATA_BYTES, Arrivals
from service.rpc.calls import Calls
from service.rpc.convert import SERVICES
from service.rpc.denoise import DenoiserCalls
from service.rpc.health import Health
from service.rpc.open_inference import InferenceCalls
from service.settings import INT32_MAX
from service.tracing import NO_TRACER, Tracer

log = logging.getLogger(__name__)

TOLERATED = 4
"""Messages up to so many times the limit are refused by us; for larger ones gRPC's status reads as a full queue."""
CONNECTION_MINUTES = 5
"""A channel is asked to connect anew after this long, and its calls go on. So a load balancer sees it again, and it
learns of servers that have been added meanwhile."""
PARTING_MINUTES = MAX_TIMEOUT_MS / 60_000
"""Then it has as long as a caller may give a request, and is closed: answers that nobody reads would stay for ever."""

PING_SECONDS = 8.0
"""How often a caller who waits for an answer may ask whether the connection still stands; who asks more often loses it.
Clients may be set to ask every 10 s. gRPC's own five minutes would end a call with the third or fourth question.
"""

MOST_STREAMS = 1000
"""Calls of one connection at a time. gRPC holds what it receives of each: unbounded, one caller could fill memory."""
POLL_SECONDS, REOPEN_SECONDS = 0.2, 1.0
"""How often it is checked that the server has not ended by itself; how often a port that is taken is tried again."""
RETIRING_SECONDS = 30.0
"""How long the calls of a server that has ended by itself may still take."""


class RpcServer:
    """Belongs to the event loop that it is made on. `port` is known once it has started."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        metrics: Metrics,
        *,
        max_message_bytes: int,
        api_key: str | None = None,
        tracer: Tracer = NO_TRACER,
        share_port: bool = False,
    ) -> None:
        self.port = 0
        self._shares_port = share_port
        self._lifecycle, self._metrics, self._tracer = lifecycle, metrics, tracer
        self._max_message_bytes, self._api_key = max_message_bytes, api_key
        self._server = self._made()
        self._keeping: asyncio.Task[None] | None = None
        self._parting: asyncio.Task[None] | None = None
        self._retired: dict[grpc.aio.Server, asyncio.Task[None]] = {}  # they may still have calls

    async def start(self, host: str, port: int) -> None:
        """Raises `OSError` if the address cannot be bound."""
        await self._listen(host, port)
        self._keeping = asyncio.create_task(self._keep(host), name="gRPC")

    def part(self) -> None:
        """Take no more connections, and ask those that stand to go elsewhere with their next calls. Calls under way go
        on until `stop`.
        """
        if self._keeping is not None:
            self._keeping.cancel()  # first, or it would start the server again
        self._parting = asyncio.create_task(self._server.stop(math.inf), name="gRPC parting")

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls; those under way get the grace period to be answered."""
        if self._keeping is not None:
            self._keeping.cancel()
        servers = self._server, *self._retired
        stopping = [server.stop(grace_seconds) for server in servers]
        await asyncio.gather(*stopping, *filter(None, [self._parting]), return_exceptions=True)

    def _made(self) -> grpc.aio.Server:
        door = [] if self._api_key is None else [Door(ApiKey(self._api_key), self._metrics)]
        made = grpc.aio.server(
            interceptors=[Arrivals(self._metrics, self._max_message_bytes), Calls(self._tracer), *door],
            options=[
                ("grpc.max_receive_message_length", min(TOLERATED * self._max_message_bytes, INT32_MAX)),
                ("grpc.max_connection_age_ms", round(CONNECTION_MINUTES * 60_000)),
                ("grpc.max_connection_age_grace_ms", round(PARTING_MINUTES * 60_000)),
                ("grpc.http2.min_ping_interval_without_data_ms", round(PING_SECONDS * 1000)),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.max_metadata_size", METADATA_BYTES),  # gRPC refuses at random between the two
                ("grpc.absolute_max_metadata_size", METADATA_BYTES),
                ("grpc.so_reuseport", int(self._shares_port)),  # else another server could share the port unnoticed
            ],
        )
        services = (DenoiserCalls, InferenceCalls)
        made.add_generic_rpc_handlers(
            [calls(self._lifecycle, self._metrics, self._max_message_bytes).handler() for calls in services]
        )
        add_HealthServicer_to_server(Health(self._lifecycle), made)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), made)
        return made

    async def _listen(self, host: str, port: int) -> None:
        try:
            if not self._shares_port:
                bound(host, port).close()  # tried before gRPC, which would write its own message to standard error
            self.port = self._server.add_insecure_port(address(host, port))
        except (OSError, RuntimeError) as error:
            raise cannot_listen(host, port, error) from None
        await self._server.start()

    async def _keep(self, host: str) -> None:
        """Start a new server whenever gRPC's ends by itself, as on a call whose path is not UTF-8 (grpcio 1.85).

        Calls under way may then be cut off. Now and then the whole process ends, and its supervisor restarts it.
        """
        while True:
            while await self._goes_on():
                pass
            log.error("the gRPC server has ended by itself: it begins anew")
            self._retired[self._server] = asyncio.create_task(self._retire(self._server))
            self._server = self._made()
            while not await self._listens_again(host):
                await asyncio.sleep(REOPEN_SECONDS)

    async def _retire(self, server: grpc.aio.Server) -> None:
        with suppress(Exception):  # it raises what ended the server again
            await server.stop(RETIRING_SECONDS)
        self._retired.pop(server, None)

    async def _goes_on(self) -> bool:
        """Polled: a plain wait would return only when the connection that caused the end has closed."""
        with suppress(Exception):  # what ended it is logged by gRPC
            return await self._server.wait_for_termination(POLL_SECONDS)
        return False

    async def _listens_again(self, host: str) -> bool:
        try:
            await self._listen(host, self.port)
        except OSError as error:
            log.error("%s", error)
            return False
        return True
