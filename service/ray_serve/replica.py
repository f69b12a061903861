"""One server in a process of Ray's: what `service.runtime` is to a process of its own.

Serve's proxies listen, the rest is the same: settings, host, denoiser, HTTP application, gRPC calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from service.errors import FailedPrecondition, Unavailable
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.process import logs
from service.ray_serve.edge import Edge
from service.ray_serve.metering import RayBoard, ReplicaMetrics
from service.ray_serve.options import n_batches
from service.ray_serve.rpc import Encoded, ServeCalls, ServeContext
from service.ray_serve.scaling import LOAD, WAITING
from service.rest.app import create_app
from service.settings import Settings, secret
from service.tracing.opening import open_tracer

log = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine gave up. Serve puts another replica in this one's place."""


class Replica:
    """What Serve calls: its hooks, whose names are fixed, and the methods of the gRPC services.

    Serve ends a replica only when its requests are answered, so nothing has to be refused while it ends.
    """

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_level, settings.log_format)
        context = serve.get_replica_context()
        self._settings = settings
        self._lifecycle = Lifecycle()
        board = RayBoard(f"{context.app_name}.{context.deployment}.metrics")
        self._metrics = ReplicaMetrics(time.monotonic, context.replica_tag, board)
        self._tracer = open_tracer(settings.otel_endpoint)
        self._host = Host(settings, self._lifecycle, self._metrics, self._tracer)
        self._api_key = secret(settings.api_key)
        self._calls = ServeCalls(
            self._lifecycle,
            self._metrics,
            max_message_bytes=settings.max_body_bytes,
            api_key=self._api_key,
            tracer=self._tracer,
        )

    async def __serve_build_asgi_app__(self) -> Any:
        """The HTTP application, once the model is loaded."""
        await self._host.load()
        self._reporting = asyncio.create_task(self._metrics.report_forever())
        app = create_app(
            self._lifecycle,
            self._metrics,
            max_body_bytes=self._settings.max_body_bytes,
            api_key=self._api_key,
            tracer=self._tracer,
        )
        app.add_middleware(Edge)  # added last, runs first
        return app

    async def reconfigure(self, _user_config: Any) -> None:
        """A changed `user_config` reloads the checkpoint file. One that cannot be served is logged, by the host, and
        changes nothing: raising here would end the replica.
        """
        await self._host.at_rest()
        try:
            change = await self._host.reload()
        except FailedPrecondition:
            pass
        except Unavailable as error:
            log.error("no reload: %s", error.message)
        else:
            log.info("reload: %s", change.outcome)

    async def check_health(self) -> None:
        """Raises `EngineFailed`."""
        if self._host.failed.is_set():
            raise EngineFailed("the engine has failed for good; its log says why")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {WAITING: self._host.waiting, LOAD: self._metrics.load(n_batches(self._settings))}

    async def __del__(self) -> None:
        """Requests left after Serve's grace period fail with an error, instead of being cut off."""
        await self._metrics.leave()
        await self._host.drain(0)
        await asyncio.to_thread(self._tracer.close)

    async def Denoise(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("Denoise", message, grpc_context)

    async def DenoiseBatch(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("DenoiseBatch", message, grpc_context)

    async def DenoiseStream(self, message: bytes, grpc_context: ServeContext) -> AsyncGenerator[Encoded, None]:
        async with aclosing(self._calls.stream("DenoiseStream", message, grpc_context)) as events:
            async for event in events:
                yield event

    async def GetModel(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("GetModel", message, grpc_context)

    async def ServerLive(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ServerLive", message, grpc_context)

    async def ServerReady(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ServerReady", message, grpc_context)

    async def ModelReady(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ModelReady", message, grpc_context)

    async def ServerMetadata(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ServerMetadata", message, grpc_context)

    async def ModelMetadata(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ModelMetadata", message, grpc_context)

    async def ModelInfer(self, message: bytes, grpc_context: ServeContext) -> Encoded:
        return await self._calls.unary("ModelInfer", message, grpc_context)
