"""The client side of a load test: requests as texts, arrival times, senders, and results.

The client shares the machine with what it measures, so it has to be cheap: REST goes over plain HTTP/1.1
connections that are kept alive, which takes a tenth of the time of a full client library.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from operator import itemgetter
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import grpc

from benchmarks.traffic import steady
from benchmarks.workloads import make_jobs
from rdt_core import Tokenizer
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub

TIMEOUT_SECONDS = 120.0
KEEP_SECONDS = 3.0
"""How long an idle connection is trusted: uvicorn closes it after five."""
CONTENT_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
OK = "ok"

Item = TypeVar("Item")
Send = Callable[[Item], Awaitable[None]]
"""Sends one request and waits for its answer. Raises `Unsuccessful`, `OSError` or `EOFError`."""


class Unsuccessful(Exception):
    """An answer that is no success; `status` names it in the transport's words."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A text to restore in exactly `max_steps` passes; `n_tokens` counts `[CLS]` and `[SEP]`."""

    text: str
    max_steps: int
    n_tokens: int
    n_masked: int
    threshold: float = 0.0

    def body(self) -> dict[str, Any]:
        """The fields of `POST /denoise`, and of gRPC's `DenoiseRequest`."""
        return {"text": self.text, "max_steps": self.max_steps, "threshold": self.threshold, "halting": "gate"}


@dataclass(frozen=True)
class Sample:
    """The result of one request, in seconds; `latency` counts from when it should have been sent."""

    arrival: float
    latency: float
    ok: bool
    status: str


def texts(workload: str, n: int, tokenizer: Tokenizer, seed: int = 0) -> list[Request]:
    """The jobs of a workload as texts: the same lengths, masks and depths, in words of one token each."""
    words, rng = whole_words(tokenizer), random.Random(seed)
    return [
        Request(
            text=" ".join("[MASK]" if masked else rng.choice(words) for masked in job.masked[1:-1]),
            max_steps=job.max_steps,
            n_tokens=len(job.tokens),
            n_masked=sum(job.masked),
            threshold=job.threshold,
        )
        for job in make_jobs(workload, n, tokenizer.vocab_size, seed)
    ]


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Lower-case words of the vocabulary that stay one token when they are read again."""
    words = [piece for piece in tokenizer.pieces if piece.isalpha() and piece.islower()]
    encoded = zip(words, tokenizer.encode_training(words), strict=True)
    return [word for word, ids in encoded if len(ids) == 1 and ids[0] not in tokenizer.special_ids]


def poisson(rate: float, n: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds of `n` requests, `rate` a second on average."""
    return list(islice(steady(rate, math.inf, seed), n))


def freeze() -> None:
    """Exempt all present objects from garbage collection, which would stop the client for a quarter of a second."""
    gc.collect()
    gc.freeze()


class Http:
    """Plain HTTP/1.1 with as many kept-alive connections as there are exchanges at once."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []  # since when

    async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and content of the answer. Raises `OSError` or `EOFError` when there is none in time."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await self._connection()
            try:
                writer.write(
                    f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                head = await reader.readuntil(b"\r\n\r\n")
                length = CONTENT_LENGTH.search(head)
                if length is None:
                    raise Unsuccessful("no content-length")
                content = await reader.readexactly(int(length[1]))
            except BaseException:
                writer.close()
                raise
        self._idle.append((time.monotonic(), reader, writer))
        return int(head.split(b" ", 2)[1]), content

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < KEEP_SECONDS and not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _since, _reader, writer in self._idle:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def rest_sender(
    url: str,
    path: str = "/denoise",
    body: Callable[[Request], Mapping[str, Any]] = Request.body,
    steps: Callable[[Any], int] | None = itemgetter("steps"),
) -> AsyncIterator[Send[Request]]:
    """Posts JSON. `steps` finds the passes made in the decoded answer; None: they are not checked."""
    async with Http(url) as http:

        async def send(request: Request) -> None:
            status, content = await http.exchange("POST", path, json.dumps(body(request)).encode())
            if not 200 <= status < 300:
                raise Unsuccessful(str(status))
            if steps is not None:
                check_steps(request, steps(json.loads(content)))

        yield send


@asynccontextmanager
async def grpc_sender(address: str, connections: int = 1) -> AsyncIterator[Send[Request]]:
    """Calls `rdt.v1.Denoiser` at `host:port`, over its connections in turn."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # or they would be one connection
    async with AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
        denoisers = cycle([DenoiserStub(await stack.enter_async_context(channel)) for channel in channels])

        async def send(request: Request) -> None:
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):  # not a deadline of the call: the server would act on it
                    answer = await next(denoisers).Denoise(pb.DenoiseRequest(**request.body()))
            except grpc.aio.AioRpcError as error:
                raise Unsuccessful(error.code().name) from None
            check_steps(request, answer.steps)

        yield send


def check_steps(request: Request, steps: int) -> None:
    """Fail a request that was answered with fewer passes than it asked for."""
    if steps != request.max_steps:
        raise Unsuccessful("wrong steps")


async def drive(send: Send[Item], requests: Iterable[Item], arrivals: Iterable[float]) -> list[Sample]:
    """Open loop: every request is sent at its arrival time, whatever became of those before it."""
    began = time.perf_counter()

    async def sample(request: Item, arrival: float) -> Sample:
        status = OK
        try:
            await send(request)
        except Unsuccessful as error:
            status = error.status
        except (OSError, EOFError) as error:
            status = type(error).__name__
        return Sample(arrival, time.perf_counter() - began - arrival, status == OK, status)

    sent = []
    for request, arrival in zip(requests, arrivals, strict=True):
        await asyncio.sleep(began + arrival - time.perf_counter())
        sent.append(asyncio.create_task(sample(request, arrival)))
    return list(await asyncio.gather(*sent))


async def saturate(send: Send[Item], requests: Sequence[Item], concurrency: int) -> float:
    """Closed loop: requests a second with `concurrency` always under way. Raises what `send` raises."""
    left = iter(requests)

    async def caller() -> None:
        for request in left:
            await send(request)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())
    return len(requests) / (time.perf_counter() - began)


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that so many percent do not exceed; None without values."""
    ranked = sorted(values)
    return ranked[max(1, math.ceil(percent / 100 * len(ranked))) - 1] if ranked else None


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


def summary(samples: Sequence[Sample], bound_seconds: float, *, while_arriving: bool = False) -> dict[str, Any]:
    """Rates a second until the last answer, latencies of what was answered, and errors by status.

    Goodput counts the answers that came within the bound. `while_arriving` ends rates with the last arrival, and does
    not count what was answered later.
    """
    answered = [sample.latency for sample in samples if sample.ok]
    last = max(sample.arrival for sample in samples)
    elapsed = last if while_arriving else max(sample.arrival + sample.latency for sample in samples)
    counted = [sample.latency for sample in samples if sample.ok and sample.arrival + sample.latency <= elapsed]
    return {
        "requests": len(samples),
        "offered_per_second": round(len(samples) / last, 2),
        "answered_per_second": round(len(counted) / elapsed, 2),
        "goodput_per_second": round(sum(latency <= bound_seconds for latency in counted) / elapsed, 2),
        **{f"p{percent}_ms": milliseconds(percentile(answered, percent)) for percent in (50, 90, 99)},
        "errors": dict(Counter(sample.status for sample in samples if not sample.ok)),
    }
