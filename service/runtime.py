"""The composition root: settings -> checkpoint -> engine -> denoiser -> two listening servers, and back down.

The ports are bound first and the checkpoint loaded behind it, so that probes get true answers from the
start. On SIGTERM or SIGINT new requests are refused, accepted ones finish within the grace period, and
the process ends with 0. A checkpoint that cannot be loaded ends it with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import torch
import uvicorn

from rdt_core import LoadedModel, ModelConfig, Tokenizer
from service.denoiser import Denoiser
from service.engine.eager import EagerBackend
from service.engine.engine import BatchingEngine, Engine
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job
from service.lifecycle import Lifecycle
from service.limits import Limits
from service.loading import load_model
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.schema import ModelCard
from service.settings import Settings

log = logging.getLogger(__name__)

WARM_TICKS, WARM_TOKENS = 16, 2048
"""So many sizes of tick are run before the first request, up to this one at the most."""

FLUSH_SECONDS = 5
"""How long slow callers may take to read their answers once the engine has finished."""


class Runtime:
    """One server: what it is made of, before and after its model is there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lifecycle = Lifecycle()
        self.engine: BatchingEngine | None = None
        self.metrics = Metrics(time.monotonic)
        api_key = None if settings.api_key is None else settings.api_key.get_secret_value()
        parts, n_bytes = (self.lifecycle, self.metrics), settings.max_body_bytes
        self.app = create_app(*parts, max_body_bytes=n_bytes, api_key=api_key)
        self.rpc = RpcServer(*parts, max_message_bytes=n_bytes, api_key=api_key)

    async def load(self) -> None:
        """Load the checkpoint, warm the engine with one request, and open for more."""
        settings = self.settings
        began = time.monotonic()
        torch.set_num_threads(settings.threads)
        loaded = await asyncio.to_thread(load_model, settings.checkpoint, settings.device, settings.precision)
        limits = scheduler_limits(settings, loaded.model.config)
        n_replicas = settings.replicas or usable_cores(loaded.model.device)
        self.engine = engine = BatchingEngine(
            [EagerBackend(loaded.model) for _ in range(n_replicas)], limits, on_tick=self.metrics.ticked
        )
        await engine.warm(warm_jobs(loaded.tokenizer, min(settings.token_budget, WARM_TOKENS)))
        await engine.start()
        gc.collect()
        gc.freeze()  # what is here now stays: a full collection over it would hold every request up for 0.2 s
        self.lifecycle.open(build_denoiser(loaded, engine, settings, self.metrics))
        log.info("ready after %.1f s: %s on %s", time.monotonic() - began, loaded.name, loaded.model.device)


def usable_cores(device: torch.device) -> int:
    """One batch a core, each in one thread: several threads to a batch wait for one another at every operation,
    and for the event loop when it takes one of their cores. A GPU takes one batch at a time.
    """
    if device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scheduler_limits(settings: Settings, config: ModelConfig) -> SchedulerLimits:
    """Raises `ValueError` for a tick that could not hold the longest text the model takes."""
    if settings.token_budget < config.max_seq_len:
        raise ValueError(f"token_budget is {settings.token_budget}: want at least max_seq_len = {config.max_seq_len}")
    return settings.scheduler_limits


def build_denoiser(loaded: LoadedModel, engine: Engine, settings: Settings, metrics: Metrics) -> Denoiser:
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
        device=str(loaded.model.device),
        precision=settings.precision,
        n_parameters=loaded.model.n_parameters,
        configuration=config.to_mapping(),
        limits=limits.shown,
    )
    return Denoiser(card=card, config=config, tokenizer=loaded.tokenizer, engine=engine, limits=limits, metrics=metrics)


async def serve(settings: Settings) -> int:
    """Run until a signal comes. Returns the exit status; raises `OSError` if the address cannot be had."""
    stopped = _signalled()
    runtime = Runtime(settings)
    with listen(settings.host, settings.http_port) as listener:
        await runtime.rpc.start(settings.host, settings.grpc_port)
        log.info("listening on http://%s:%d", *listener.getsockname()[:2])
        log.info("listening on grpc://%s:%d", settings.host, runtime.rpc.port)
        server = _Server(
            uvicorn.Config(
                runtime.app, log_config=None, access_log=settings.log_level == "debug", lifespan="off", ws="none",
                server_header=False, timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )  # fmt: skip
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        status = await _load_and_wait(runtime, stopped)
        await runtime.lifecycle.drain(settings.grace_seconds)
        server.should_exit = True
        await asyncio.gather(answering, runtime.rpc.stop(FLUSH_SECONDS))
    return status


def listen(host: str, port: int) -> socket.socket:
    """Raises `OSError` naming the address.

    Accepted connections send at once (they inherit the option): an answer is a head and a body, and with
    Nagle's algorithm the body of every second one would wait 40 ms for the caller's acknowledgement.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _signalled() -> asyncio.Event:
    """Set once the process has been asked to end."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def _load_and_wait(runtime: Runtime, stopped: asyncio.Event) -> int:
    """Until a signal comes (0), loading fails or the engine gives up (1)."""
    stopping = asyncio.create_task(stopped.wait())
    loading = asyncio.create_task(runtime.load())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and (error := loading.exception()) is not None:
        log.debug("loading failed", exc_info=error)
        print(f"rdt-serve: cannot start: {error}", file=sys.stderr)
        stopping.cancel()
        return 1
    if runtime.engine is not None and not stopped.is_set():
        failing = asyncio.create_task(runtime.engine.failed.wait())
        await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
    stopping.cancel()
    loading.cancel()
    if not stopped.is_set():
        log.critical("the engine has failed twice in a minute: ending the process")
        return 1
    log.info("draining")
    return 0


def warm_jobs(tokenizer: Tokenizer, max_tokens: int) -> list[Job]:
    """The first pass of a thread is slow, and so is the first of each size; no caller should meet one."""
    jobs = []
    for n_tokens in range(max_tokens, 2, -max(1, max_tokens // WARM_TICKS)):
        masked = [row % 8 == 1 for row in range(n_tokens)]
        tokens = [tokenizer.mask_id if hidden else tokenizer.cls_id for hidden in masked]
        jobs.append(Job(tokens, masked, max_steps=1, threshold=0.0, halting="gate"))
    return jobs


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield
