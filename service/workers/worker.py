"""An API worker: both transports and the use case, with the engine at the other end of a connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from rdt_core import ModelConfig, Tokenizer
from service.denoiser import Denoiser
from service.lifecycle import Lifecycle
from service.limits import Limits
from service.metrics import Metrics
from service.process import garbage
from service.runtime import FrontEnd, listen
from service.schema import ModelCard
from service.settings import Settings
from service.tracing import NO_TRACER, Tracer
from service.tracing.opening import open_tracer
from service.workers.messages import Adopted, Leave, Message, Reload, Reloaded, ReportWanted, Serving
from service.workers.metering import WorkerMetrics
from service.workers.remote import Link, QueueView, RemoteEngine
from service.workers.wire import Wire

log = logging.getLogger(__name__)

FIRST_MODEL_SECONDS = 1.0
"""How long a worker waits for a model before it listens. Once it listens it gets a share of the connections, even if it
cannot answer them yet."""


class Worker:
    """Serves the model that the engine serves."""

    def __init__(self, settings: Settings, name: str, path: Path, tracer: Tracer = NO_TRACER) -> None:
        self._settings = settings
        self._tracer = tracer
        self.lifecycle = Lifecycle()
        self.link = Link(path, name, self._hear)
        self.metrics = WorkerMetrics(time.monotonic, self.link)
        self.metrics.watch_readiness(lambda: self.lifecycle.state == "ready")
        self._queue = QueueView(self.link, settings.max_waiting, settings.max_waiting_tokens)
        self._tokenizer: Tokenizer | None = None
        self._adopting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopted = asyncio.Event()

    def start(self) -> None:
        self._begin(self.link.run())
        self._begin(self.metrics.report_forever())

    async def first_model(self, seconds: float) -> None:
        """Returns when it serves a model, or after so many seconds: an engine that is up announces it at once."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._adopted.wait(), seconds)

    async def reload(self) -> Reloaded:
        """Ask the engine to reload. Afterwards every worker serves the new model. Raises as `Host.reload` does."""
        self.lifecycle.check()
        return await self.link.ask(Reload, Reloaded)

    async def drain(self, grace_seconds: float) -> None:
        await self.lifecycle.drain(grace_seconds, self.link)

    async def stop(self) -> None:
        """Send the last counters, and disconnect."""
        self.link.send(self.metrics.report())
        self.link.send(Leave())
        self.link.draining = True
        self.link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hear(self, wire: Wire, message: Message) -> None:
        if isinstance(message, Serving):
            self._begin(self._adopt(wire, message))
        elif isinstance(message, ReportWanted):
            wire.send(self.metrics.report(message.asked))

    async def _adopt(self, wire: Wire, serving: Serving) -> None:
        """Serve this model from now on, and tell the engine once no job of an earlier one can follow."""
        async with self._adopting:  # one after another, in order
            if wire is not self.link.wire:
                return
            if self._tokenizer is None or self._tokenizer.json != serving.tokenizer:
                self._tokenizer = await asyncio.to_thread(Tokenizer, serving.tokenizer)
            engine = RemoteEngine(self.link, wire, serving, self._queue)
            denoiser = build_denoiser(serving, self._tokenizer, engine, self.metrics, self._tracer)
            self.lifecycle.open(denoiser)
            if not self._adopted.is_set():
                garbage.freeze()
            await self.lifecycle.handed_over()
            wire.send(Adopted(serving.digest))
            self._adopted.set()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)


def build_denoiser(
    serving: Serving, tokenizer: Tokenizer, engine: RemoteEngine, metrics: Metrics, tracer: Tracer
) -> Denoiser:
    card = ModelCard.model_validate(serving.card)
    return Denoiser(
        card=card,
        config=ModelConfig.from_mapping(card.configuration),
        tokenizer=tokenizer,
        engine=engine,
        limits=Limits(**serving.limits),
        metrics=metrics,
        tracer=tracer,
    )


async def run(settings: Settings, name: str, path: Path, stopped: asyncio.Event) -> int:
    """Run until asked to end. Raises `OSError` if the addresses cannot be bound."""
    tracer = open_tracer(settings.otel_endpoint)
    worker = Worker(settings, name, path, tracer)
    front = FrontEnd(settings, worker.lifecycle, worker.metrics, tracer, worker.reload, share_port=True)
    worker.start()
    await worker.first_model(FIRST_MODEL_SECONDS)
    with listen(settings.host, settings.http_port, share=True) as listener:
        await front.open(listener)
        await stopped.wait()
        front.part()
        await worker.drain(settings.grace_seconds)
        await front.close()
        await worker.stop()
    await asyncio.to_thread(tracer.close)
    return 0
