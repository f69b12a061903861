"""Stand-ins that make server tests instant and exact: a clock, an engine, a computation to hold and let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property

import grpc
import httpx
from fastapi import FastAPI

from rdt_core import ModelConfig, Tokenizer
from service.denoiser import Denoiser
from service.engine.protocol import OnReading
from service.engine.queue import Place
from service.engine.types import Choice, Job, Reading, Result
from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.limits import Limits
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.schema import ModelCard
from service.tracing import NO_TRACER, Tracer

MAX_BODY_BYTES = 4096


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fake_result(job: Job, token: int, steps: int = 2) -> Result:
    """Every masked row (every row with `decode_all`) read as `token`."""
    rows = [row for row, masked in enumerate(job.masked) if masked or job.decode_all]
    return Result(
        tokens=[token if row in rows else given for row, given in enumerate(job.tokens)],
        rows=rows,
        probabilities=[0.5] * len(rows),
        fixed_at=[steps] * len(rows),
        candidates=[[(token, 0.5)] * job.top_k for _ in rows],
        steps=steps,
        levels=[1 / (step + 1) for step in range(1, steps + 1)],
        reason="gate",
        max_steps=job.max_steps,
        queue_seconds=0.25,
        compute_seconds=0.5,
    )


def fake_reading(job: Job, token: int, step: int, steps: int) -> Reading:
    """Guesses of the masked rows, and in the last pass the choices that `fake_result` lists."""
    last = step == steps
    rows = [row for row, masked in enumerate(job.masked) if masked or (last and job.decode_all)]
    choices = [Choice(row, token, 0.5, []) for row in rows]
    level = 1 / (step + 1)
    return Reading(level, "gate", choices, []) if last else Reading(level, None, [], choices)


class FakeEngine:
    """Answers at once, raises `error`, or stands still while `held`. Remembers the jobs it was given."""

    def __init__(self, token: int, steps: int = 2) -> None:
        self.token = token
        self.steps = steps
        self.ready = True
        self.waiting = self.waiting_tokens = 0
        self.live = 0
        self.jobs: list[Job] = []
        self.error: Exception | None = None
        self.error_after_pass = 0  # of a streamed job
        self.held: asyncio.Event | None = None  # set it to let jobs go on after their first pass
        self.n_left = 0  # jobs whose caller left
        self.full: ServiceError | None = None
        self.grace_seconds: float | None = None

    async def start(self) -> None:
        self.ready = True

    @contextmanager
    def reserve(self) -> Iterator[Place]:
        if self.full is not None:
            raise self.full
        yield Place()

    async def submit(self, job: Job, place: Place, on_reading: OnReading | None = None) -> Result:
        assert place.held
        self.jobs.append(job)
        self.live += 1
        try:
            for step in range(1, self.steps + 1):
                if self.error is not None and step > self.error_after_pass:
                    raise self.error
                if on_reading is not None:
                    on_reading(fake_reading(job, self.token, step, self.steps))
                if self.held is not None:
                    await self.held.wait()
        except asyncio.CancelledError:
            self.n_left += 1
            raise
        finally:
            self.live -= 1
        return fake_result(job, self.token, self.steps)

    async def drain(self, grace_seconds: float) -> None:
        self.ready = False
        self.grace_seconds = grace_seconds

    async def stop(self) -> None:
        self.ready = False


class Service:
    """An application over a fake engine, and all the parts a test wants to look at."""

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, api_key: str | None = None, tracer: Tracer = NO_TRACER
    ) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics(self.clock)
        self.engine = FakeEngine(token=token_of(tokenizer, "fox"))
        self.lifecycle = Lifecycle()
        self.denoiser = Denoiser(
            card=ModelCard(
                name="tiny", digest="0123456789abcdef", device="cpu", precision="fp32", n_parameters=1,
                configuration=config.to_mapping(), limits={},
            ),
            config=config, tokenizer=tokenizer, engine=self.engine,
            limits=Limits(config.max_seq_len, max_steps=100, max_top_k=5, max_batch_items=4),
            metrics=self.metrics, clock=self.clock, tracer=tracer,
        )  # fmt: skip
        self.metrics.watch(self.engine)
        card = self.denoiser.card
        self.metrics.describe_model(card.name, card.digest, card.device, card.precision)
        self.api_key = api_key
        self.tracer = tracer

    @cached_property
    def app(self) -> FastAPI:
        """Made when it is asked for: many tests do without, and describing its interface takes a while."""
        return create_app(
            self.lifecycle, self.metrics, max_body_bytes=MAX_BODY_BYTES, api_key=self.api_key, tracer=self.tracer
        )

    def open(self) -> Service:
        self.lifecycle.open(self.denoiser)
        return self

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://rdt") as client:
            yield client

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """To a gRPC server over the same parts. When this ends its calls have come to their ends, too: a caller has the
        status of one that fails before the last of it has run.
        """
        others = {*asyncio.all_tasks()}
        server = RpcServer(
            self.lifecycle, self.metrics, max_message_bytes=MAX_BODY_BYTES, api_key=self.api_key, tracer=self.tracer
        )
        await server.start("127.0.0.1", 0)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield channel
        finally:  # a server that is not stopped would hang the end of the test's loop
            await server.stop(0)
            if calls := asyncio.all_tasks() - others - {asyncio.current_task()}:
                await asyncio.wait(calls, timeout=5)

    async def until_live(self, n_jobs: int) -> None:
        """Until the engine has so many."""
        async with asyncio.timeout(10):
            while self.engine.live != n_jobs:
                await asyncio.sleep(0.005)

    def sample(self, name: str, **labels: str) -> float:
        """One value of the registry; 0 for a series nobody has touched."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def token_of(tokenizer: Tokenizer, piece: str) -> int:
    return next(token for token in range(tokenizer.vocab_size) if tokenizer.piece(token) == piece)
