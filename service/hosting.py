"""From a checkpoint file to a model that takes requests, and from that one to the next without a gap.

load     file -> model -> engine, warmed -> the lifecycle opens
reload   the same beside the old model; then new requests go to the new one, and the old one ends with its last request
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from rdt_core import LoadedModel, Tokenizer
from service.denoiser import Denoiser
from service.engine.backend import OutOfMemory
from service.engine.backends import make_backend
from service.engine.engine import BatchingEngine
from service.engine.protocol import Engine
from service.engine.replica import THREAD_NAME
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job
from service.errors import FailedPrecondition, Unavailable
from service.lifecycle import Lifecycle
from service.limits import Limits
from service.loading import check_numbers, has_digest, read_models
from service.metrics import Metrics
from service.process import garbage
from service.process.cores import usable_cores
from service.schema import ModelCard
from service.settings import Settings
from service.tracing import NO_TRACER, Tracer

log = logging.getLogger(__name__)

Value = TypeVar("Value")

WARM_TICKS, WARM_TOKENS, FEW_TOKENS = 16, 2048, (16, 8, 4)
"""Before the first request, so many sizes of tick are run up to `WARM_TOKENS`, and then those of one short text."""

SWITCH_SECONDS = 0.0005
"""How long a thread may hold the interpreter's lock while others wait. A computing thread releases and takes it at
every operation of a tick; beside a busy event loop, each would wait for Python's default of 5 ms."""

UNSERVABLE = (ValueError, OSError, RuntimeError, OutOfMemory)
"""Errors for which the checkpoint is to blame: its contents (`CheckpointError`), reading it, its size. Others are
defects of ours."""


@dataclass(frozen=True)
class Change:
    """What a reload came to: whether the file held another model, and which one is served now."""

    outcome: Literal["swapped", "unchanged"]
    previous: str
    model: str


class Host:
    """Owns the engines: the one that takes requests and, for a while after a reload, the one that finishes its own."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle, metrics: Metrics, tracer: Tracer = NO_TRACER) -> None:
        self.failed = asyncio.Event()
        """Set when the engine gave up: the process should end."""
        self._settings = settings
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracer = tracer
        self._engine: BatchingEngine | None = None
        self._retiring: BatchingEngine | None = None
        self._reloading = False
        self._at_rest = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._finishing: asyncio.Task[None] | None = None
        metrics.watch(self)
        metrics.watch_budget(lambda: 0 if self._engine is None else self._engine.largest_tick)
        metrics.watch_readiness(lambda: lifecycle.state == "ready")

    @property
    def waiting(self) -> int:
        return sum(engine.waiting for engine in self._engines)

    @property
    def waiting_tokens(self) -> int:
        return sum(engine.waiting_tokens for engine in self._engines)

    @property
    def live(self) -> int:
        return sum(engine.live for engine in self._engines)

    async def load(self) -> None:
        """Load the checkpoint, warm an engine on it, and open for requests.

        Raises `CheckpointError` for the file, `ValueError` for settings that do not go with it.
        """
        began = time.monotonic()
        torch.set_num_threads(self._settings.threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        loaded, *more = await _beside(read_models, self._settings)
        engine = await self._warm_engine(loaded, *more)
        card = self._open(loaded, engine)
        garbage.freeze()
        self._at_rest.set()
        log.info("ready after %.1f s: %s on %s", time.monotonic() - began, card.label, card.device)

    async def at_rest(self) -> None:
        """Returns when the model is loaded and no reload is under way: `reload` can be called at once."""
        while not self._at_rest.is_set():  # it may have been set and cleared before we ran
            await self._at_rest.wait()

    async def reload(self) -> Change:
        """Take in the checkpoint file again. Requests accepted before the swap finish on the old weights.

        Raises `FailedPrecondition` when the file cannot be served, or the last reload is not over (the old
        model stays), `Unavailable` while loading, draining or failed.
        """
        serving = self._lifecycle.denoiser.card
        if self._reloading or self._retiring is not None:
            doing = "the new model is being loaded" if self._reloading else "the old model still finishes requests"
            raise FailedPrecondition(f"the last reload is not over: {doing}")
        self._reloading, outcome = True, "failed"
        self._at_rest.clear()
        try:
            change = await self._replace(serving)
            if isinstance(change, str):
                gc.collect()  # the error's traceback still holds the model; quick, since most objects are frozen
                raise FailedPrecondition(f"the checkpoint cannot be served, {serving.label} stays: {change}")
            outcome = change.outcome
        finally:
            self._reloading = False
            self._rest()
            self._metrics.reloads.labels(outcome).inc()
        return change

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, and give accepted ones, of either model, the grace period to finish."""
        await self._lifecycle.drain(grace_seconds, *self._engines)

    async def stop(self) -> None:
        """Stop the engines and their threads; unfinished requests fail."""
        for task in (self._watching, self._finishing):
            if task is not None:
                task.cancel()
        for engine in self._engines:
            await engine.stop()

    @property
    def _engines(self) -> list[BatchingEngine]:
        return [engine for engine in (self._engine, self._retiring) if engine is not None]

    async def _warm_engine(self, loaded: LoadedModel, *more: LoadedModel) -> BatchingEngine:
        settings = self._settings
        limits = scheduler_limits(settings, loaded)
        n_replicas = settings.replicas or default_replicas(loaded.model.device, settings.threads)
        bounds = limits.token_budget, limits.max_live
        backends = [make_backend(one.model, *bounds) for one in (loaded, *more) for _ in range(n_replicas)]
        engine = BatchingEngine(backends, limits, watcher=self._metrics, stuck_seconds=settings.stuck_seconds or None)
        try:
            await engine.warm(rehearsals(loaded, limits), alone=self._engine is None)
            if engine.largest_tick < loaded.model.config.max_seq_len:
                raise OutOfMemory(f"there is memory for texts of {engine.largest_tick} tokens only")
            await _beside(check_numbers, loaded, settings.checkpoint)
            await engine.start()
        except BaseException:
            await engine.stop()
            raise
        return engine

    async def _replace(self, serving: ModelCard) -> Change | str:
        """The outcome, or why the file cannot be served."""
        try:
            if await _beside(has_digest, self._settings.checkpoint, serving.digest):
                return Change("unchanged", serving.label, serving.label)
            loaded, *more = await _beside(read_models, self._settings)
            engine = await self._warm_engine(loaded, *more)
        except Exception as error:
            why, defect = str(error) or type(error).__name__, not isinstance(error, UNSERVABLE)
            log.error("%s stays: the checkpoint cannot be served: %s", serving.label, why, exc_info=defect)
            return why
        try:
            self._lifecycle.check()
        except Unavailable:  # asked to end meanwhile, or a tick of the old model broke
            await engine.stop()
            raise
        self._retiring = self._engine
        card = self._open(loaded, engine)
        self._finishing = asyncio.create_task(self._retire())
        log.info("%s takes the place of %s", card.label, serving.label)
        return Change("swapped", serving.label, card.label)

    def _open(self, loaded: LoadedModel, engine: BatchingEngine) -> ModelCard:
        self._engine = engine
        denoiser = build_denoiser(loaded, engine, self._settings, self._metrics, self._tracer)
        card = denoiser.card
        self._metrics.describe_model(card.name, card.digest, card.device, card.precision)
        self._metrics.describe_bounds(engine.bounds, engine.n_replicas)
        self._lifecycle.open(denoiser)
        if self._watching is not None:
            self._watching.cancel()  # it holds the old engine, and so the old weights
        self._watching = asyncio.create_task(self._watch(engine))
        return card

    async def _retire(self) -> None:
        assert self._retiring is not None
        await self._lifecycle.handed_over()
        await self._retiring.retire()
        self._retiring = None
        gc.collect()  # errors of its requests may still hold it
        self._rest()

    def _rest(self) -> None:
        if not self._reloading and self._retiring is None:
            self._at_rest.set()

    async def _watch(self, engine: BatchingEngine) -> None:
        await engine.failed.wait()
        self.failed.set()


async def _beside(function: Callable[..., Value], *arguments: object) -> Value:
    """Run the function in a thread that the end of the process does not wait for: a file system may never answer."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
    finally:
        thread.shutdown(wait=False)


def default_replicas(device: torch.device, threads: int = 1) -> int:
    """One batch a core, divided by the threads of each. One thread each is best: several threads of a batch wait for
    one another at every operation, and for the event loop when it takes one of their cores. A GPU computes one batch.
    """
    return max(1, usable_cores() // threads) if device.type == "cpu" else 1


def scheduler_limits(settings: Settings, loaded: LoadedModel) -> SchedulerLimits:
    """Raises `ValueError` for a budget too small for the longest text the model takes."""
    limits, longest = settings.limits_on(loaded.model.device.type), loaded.model.config.max_seq_len
    if limits.token_budget < longest:
        raise ValueError(f"token_budget is {limits.token_budget}: want at least max_seq_len = {longest}")
    return limits


def build_denoiser(
    loaded: LoadedModel, engine: Engine, settings: Settings, metrics: Metrics, tracer: Tracer = NO_TRACER
) -> Denoiser:
    config = loaded.model.config
    limits = Limits(
        config.max_seq_len,
        settings.max_steps_limit,
        min(settings.max_top_k, config.vocab_size),
        max_batch_items=settings.max_batch_items,
    )
    card = ModelCard(
        name=loaded.name,
        digest=loaded.digest,
        device=",".join(settings.device_names) if settings.devices else str(loaded.model.device),
        precision=loaded.model.precision,
        n_parameters=loaded.model.n_parameters,
        configuration=config.to_mapping(),
        limits=limits.shown,
    )
    return Denoiser(
        card=card, config=config, tokenizer=loaded.tokenizer, engine=engine, limits=limits, metrics=metrics,
        tracer=tracer,
    )  # fmt: skip


def rehearsals(loaded: LoadedModel, limits: SchedulerLimits) -> list[list[Job]]:
    """Ticks to warm up with. First the heaviest that may occur, then (on CUDA) half of it and so on, to find out what
    there is memory for. Then one of each size, because the first pass of each size is slow.
    """
    ticks, longest = [], loaded.model.config.max_seq_len
    n_tokens = limits.token_budget
    while n_tokens >= longest:
        texts = min(n_tokens // longest, limits.max_live)
        ticks.append([_rehearsal(loaded.tokenizer, [True] * longest) for _ in range(texts)])
        n_tokens = 0 if loaded.model.device.type == "cpu" else n_tokens // 2
    most = min(limits.token_budget, WARM_TOKENS, limits.max_live * longest)
    step = max(1, most // WARM_TICKS)
    for n_tokens in (*range(most, 2, -step), *(n for n in FEW_TOKENS if n < step)):
        lengths = [longest] * (n_tokens // longest) + [n_tokens % longest] * (n_tokens % longest > 2)
        ticks.append([_rehearsal(loaded.tokenizer, [row % 8 == 1 for row in range(length)]) for length in lengths])
    return ticks


def _rehearsal(tokenizer: Tokenizer, masked: list[bool]) -> Job:
    """A job that the gate halts after one pass. With `max_steps=1`, less would be computed: not all rows are needed."""
    tokens = [tokenizer.mask_id if is_masked else tokenizer.cls_id for is_masked in masked]
    return Job(tokens, masked, max_steps=2, threshold=math.inf, halting="gate")
