"""The service `grpc.health.v1.Health`: SERVING while the lifecycle is ready, and at no other time.

Like `/health/ready` it looks the state up at each call, so that the two cannot disagree.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from service.lifecycle import Lifecycle, State
from service.rpc.convert import SERVICES

NAMES = ("", *SERVICES)  # the empty name is the whole server
POLL_SECONDS = 0.25
"""How often a watched state is looked up."""
MOST_WATCHERS = 1000
"""Watching asks for no key, and each watcher takes memory."""

Status = Literal[1, 2, 3]  # SERVING, NOT_SERVING, SERVICE_UNKNOWN
WatchContext = grpc.aio.ServicerContext[HealthCheckRequest, HealthCheckResponse]

messages: Any = health_pb2  # its type stubs do not know `List`


class Health(HealthServicer):
    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._n_watchers = 0
        self._changes: dict[State, asyncio.Task[None]] = {}  # by the state that is to change

    async def Check(self, request: HealthCheckRequest, context: WatchContext) -> HealthCheckResponse:
        if request.service not in NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"want one of {', '.join(map(repr, NAMES))}")
        return HealthCheckResponse(status=self._status(request.service))

    async def List(self, _request: object, _context: object) -> Any:
        return messages.HealthListResponse(
            statuses={name: HealthCheckResponse(status=self._status(name)) for name in NAMES}
        )

    async def Watch(self, request: HealthCheckRequest, context: WatchContext) -> None:
        """Every change of state. Ends when the server begins to drain: it must not wait for its watchers."""
        if self._n_watchers == MOST_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"there are {MOST_WATCHERS} watchers already")
        self._n_watchers += 1
        try:
            told: Status | None = None
            while True:
                state, status = self._lifecycle.state, self._status(request.service)
                if status != told:
                    await context.write(HealthCheckResponse(status=status))
                    told = status
                if state == "draining":
                    return
                await self._change_from(state)
        finally:
            self._n_watchers -= 1

    async def _change_from(self, state: State) -> None:
        """Returns once the state may be another. It is looked up by one task, however many wait."""
        change = self._changes.get(state)
        if change is None or change.done():
            change = self._changes[state] = asyncio.create_task(self._look_for_change_from(state))
        await asyncio.shield(change)

    async def _look_for_change_from(self, state: State) -> None:
        while self._lifecycle.state == state:
            await asyncio.sleep(POLL_SECONDS)

    def _status(self, service: str) -> Status:
        if service not in NAMES:
            return HealthCheckResponse.SERVICE_UNKNOWN
        ready = self._lifecycle.state == "ready"
        return HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
