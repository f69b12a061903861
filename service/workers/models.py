"""The lifecycle in the engine's process: which model is served, and which ones workers still send jobs for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Protocol

from service.denoiser import Denoiser
from service.engine.protocol import Engine
from service.errors import Unavailable
from service.lifecycle import REFUSALS, Lifecycle
from service.workers.messages import Serving

log = logging.getLogger(__name__)

ADOPTION_SECONDS = 10.0
"""A worker that has not adopted a new model by then is disconnected; it reconnects and gets that model."""
POLL_SECONDS = 0.005
"""How often it is checked whether all workers have."""


class Adopter(Protocol):
    """A worker, as far as its model is concerned."""

    adopted: str

    def abort(self) -> None: ...


class Models(Lifecycle):
    """`opened` is called with each model when it begins to be served; `adopters` returns the connected workers."""

    def __init__(self, adopters: Callable[[], Collection[Adopter]], opened: Callable[[Serving], None]) -> None:
        super().__init__()
        self._adopters = adopters
        self._opened = opened
        self._engines: dict[str, Engine] = {}  # by the digest of their model
        self.serving: Serving | None = None

    def open(self, denoiser: Denoiser) -> None:
        super().open(denoiser)
        self._engines[denoiser.card.digest] = denoiser.engine
        self.serving = Serving(denoiser.tokenizer.json, denoiser.card.model_dump(), asdict(denoiser.limits))
        self._opened(self.serving)

    def engine(self, digest: str) -> Engine:
        """The engine of the model that a job was made for. Raises `Unavailable`."""
        engine = self._engines.get(digest)
        if engine is None:
            raise Unavailable(*REFUSALS["failed"])
        return engine

    async def handed_over(self) -> None:
        """Returns once no worker sends jobs for earlier models any more."""
        await super().handed_over()
        await self.adoption()
        if self.serving is not None:
            self._engines = {self.serving.digest: self._engines[self.serving.digest]}

    async def adoption(self) -> None:
        """Returns once every worker has adopted the model that is served; those that take too long are disconnected."""
        try:
            async with asyncio.timeout(ADOPTION_SECONDS):
                while self._behind():
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            for adopter in self._behind():
                log.error("a worker does not take up the new model: cutting it off")
                adopter.abort()

    def _behind(self) -> list[Adopter]:
        digest = None if self.serving is None else self.serving.digest
        return [adopter for adopter in self._adopters() if adopter.adopted != digest]
