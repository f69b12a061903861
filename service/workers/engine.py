"""The engine's process: the host of the model, and the socket that workers reach it on. No HTTP, no gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from service.hosting import Host
from service.metrics import Metrics
from service.process.signals import take_hangup
from service.runtime import Reloader, load_and_wait
from service.settings import Settings
from service.workers.children import CANNOT_START, ENGINE_FAILED
from service.workers.metering import Ledger
from service.workers.server import EngineServer

log = logging.getLogger(__name__)


async def run(settings: Settings, path: Path, stopped: asyncio.Event) -> int:
    """Run until asked to end, and until the workers have left. The status tells the supervisor whether to try again."""
    metrics = Metrics(time.monotonic)
    server = EngineServer(Ledger(metrics, settings.api_workers))
    host = Host(settings, server.models, metrics)
    take_hangup(Reloader(host))
    await server.start(path, host)
    status = await load_and_wait(host, stopped)
    if status == 0:
        await server.left(settings.grace_seconds)
    else:
        status = ENGINE_FAILED if host.failed.is_set() else CANNOT_START
    await host.drain(settings.grace_seconds if status == 0 else 0)
    await host.stop()
    await server.stop()
    return status
