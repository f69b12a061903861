"""Workers and an engine's end in one process, over a real socket: fast, and every part within reach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rdt_core import ModelConfig, Tokenizer
from service.denoiser import Denoiser
from service.engine.backend import Backend
from service.engine.engine import BatchingEngine
from service.engine.scheduler import SchedulerLimits
from service.errors import FailedPrecondition
from service.hosting import Change
from service.limits import Limits
from service.metrics import Metrics
from service.schema import ModelCard
from service.settings import Settings
from service.workers.metering import Ledger
from service.workers.server import EngineServer
from service.workers.worker import Worker
from tests.fakes import FakeClock


async def until(seen: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not seen():
            await asyncio.sleep(0.002)


def denoiser_of(tokenizer: Tokenizer, config: ModelConfig, engine: BatchingEngine, digest: str = "a" * 64) -> Denoiser:
    limits = Limits(config.max_seq_len, max_steps=10**6, max_top_k=5, max_batch_items=4)
    card = ModelCard(
        name="tiny", digest=digest, device="cpu", precision="fp32", n_parameters=1,
        configuration=config.to_mapping(), limits=limits.shown,
    )  # fmt: skip
    return Denoiser(
        card=card, config=config, tokenizer=tokenizer, engine=engine, limits=limits, metrics=Metrics(FakeClock())
    )


class OneEngine:
    """A host of one engine that stays."""

    def __init__(self, backends: Sequence[Backend], limits: SchedulerLimits) -> None:
        self.metrics = Metrics(FakeClock())
        self.engine = BatchingEngine(backends, limits, watcher=self.metrics)
        self.metrics.watch(self.engine)

    @property
    def waiting(self) -> int:
        return self.engine.waiting

    @property
    def waiting_tokens(self) -> int:
        return self.engine.waiting_tokens

    @property
    def live(self) -> int:
        return self.engine.live

    async def reload(self) -> Change:
        raise FailedPrecondition("this one stays")


class Fleet:
    """An engine's end, and as many workers as a test asks for."""

    def __init__(self, path: Path, host: Any, settings: Settings, n_workers: int = 0) -> None:
        self.path = path
        self.host = host
        self.settings = settings
        self.server = EngineServer(Ledger(host.metrics, n_workers))
        self.workers: list[Worker] = []

    async def worker(self) -> Worker:
        """One more, ready."""
        worker = Worker(self.settings, f"{len(self.workers)}.0", self.path)
        self.workers.append(worker)
        worker.start()
        await until(lambda: worker.lifecycle.state == "ready")
        return worker

    async def die(self) -> None:
        """The engine's end, at once."""
        for peer in tuple(self.server._peers.values()):
            peer.abort()
        await self.server.stop()


@asynccontextmanager
async def running(fleet: Fleet, denoiser: Denoiser | None = None) -> AsyncIterator[Fleet]:
    """With a denoiser, ready."""
    await fleet.server.start(fleet.path, fleet.host)
    if denoiser is not None:
        await fleet.host.engine.start()
        fleet.server.models.open(denoiser)
    try:
        yield fleet
    finally:
        for worker in fleet.workers:
            await worker.stop()
        await fleet.die()
        if denoiser is not None:
            await fleet.host.engine.stop()


def brief(**changes: Any) -> dict[str, Any]:
    """A request of two tokens between `[CLS]` and `[SEP]`, halted by its threshold after a pass."""
    return {"text": "a [MASK]", "max_steps": 1, "threshold": 0.0, **changes}


async def ask(worker: Worker, fields: dict[str, Any]) -> Any:
    denoiser = worker.lifecycle.denoiser
    return await denoiser.denoise(denoiser.read(fields), "rest")
