"""Puts the gRPC interface together: the denoiser, health and reflection on one port."""

from __future__ import annotations

import socket

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from service.access import ApiKey
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rpc.access import Door
from service.rpc.calls import Calls
from service.rpc.convert import SERVICE
from service.rpc.denoise import DenoiserCalls
from service.rpc.health import Health
from service.settings import MOST
from service.tracing import NO_TRACER, Tracer

TOLERATED = 4
"""Times the limit: up to there we refuse a message ourselves; what gRPC says of larger ones reads as a full queue."""
CONNECTION_MINUTES = 5
"""A channel is asked to connect anew after this long (its calls are not interrupted), so that it learns of servers
that have been added meanwhile; a balancer of connections sees it again.
"""


class RpcServer:
    """Belongs to the event loop it is made on. `port` is known once it has started."""

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
        self._server = grpc.aio.server(
            interceptors=[Calls(tracer), *([] if api_key is None else [Door(ApiKey(api_key), metrics)])],
            options=[
                ("grpc.max_receive_message_length", min(TOLERATED * max_message_bytes, MOST)),
                ("grpc.max_connection_age_ms", round(CONNECTION_MINUTES * 60_000)),
                ("grpc.so_reuseport", int(share_port)),  # else a second server would get some of the calls unnoticed
            ],
        )
        self._server.add_generic_rpc_handlers((DenoiserCalls(lifecycle, metrics, max_message_bytes).handler(),))
        add_HealthServicer_to_server(Health(lifecycle), self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> None:
        """Raises `OSError` if the address cannot be had."""
        try:
            if not self._shares_port:
                _try_out(host, port)
            self.port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from None
        await self._server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls; those under way get the grace period to be answered."""
        await self._server.stop(grace_seconds)


def _try_out(host: str, port: int) -> None:
    """Raises `OSError`. What gRPC cannot have it writes to standard error, in a form of its own."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))
