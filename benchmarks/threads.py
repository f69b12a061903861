"""`python -m benchmarks.threads`: how compute threads and the event loop share few cores best.

The same server with more or fewer threads and replicas, other ways of waiting, and as two processes
of one replica each, side by side in rounds: capacity, latency with nothing else in flight, and p50 and p99 at
one Poisson rate for all, 60 % of what the first variant could serve.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from benchmarks import BUNDLED, record
from benchmarks.files import names_files
from benchmarks.load import Request, Send, drive, freeze, poisson, rest_sender, saturate, summary, texts
from benchmarks.options import count
from benchmarks.server import serving, unwind_on_sigterm, weights_of
from benchmarks.workloads import WORKLOADS
from rdt_core import checkpoint

CONCURRENCY = 32
SHARE = 0.6
ALONE_REQUESTS = 30
BOUND_SECONDS = 1.0


@dataclass(frozen=True)
class Variant:
    """`servers` processes with these flags and this environment, callers spread evenly."""

    flags: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    servers: int = 1


VARIANTS = {
    "1 thread": Variant(("--threads=1", "--replicas=1")),
    "2 threads": Variant(("--threads=2", "--replicas=1")),
    "2 threads, sleeping waits": Variant(
        ("--threads=2", "--replicas=1"), {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    ),
    "2 replicas": Variant(("--threads=1", "--replicas=2")),
    "2 replicas of 2 threads": Variant(("--threads=2", "--replicas=2")),
    "2 servers": Variant(("--threads=1", "--replicas=1"), servers=2),
}


@dataclass(frozen=True)
class Running:
    send: Send[Request]
    taken: dict[str, list[Any]] = field(default_factory=lambda: {"capacity": [], "alone_ms": [], "level": []})


async def alone(send: Send[Request], requests: Sequence[Request]) -> float:
    """Median milliseconds of requests sent one after another."""
    taken = []
    for request in requests[:ALONE_REQUESTS]:
        began = time.perf_counter()
        await send(request)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


async def open_sender(stack: AsyncExitStack, urls: Sequence[str]) -> Send[Request]:
    """Each request to the next server in turn."""
    senders = cycle([await stack.enter_async_context(rest_sender(url)) for url in urls])

    async def send(request: Request) -> None:
        await next(senders)(request)

    return send


async def measure(options: argparse.Namespace, urls: dict[str, list[str]], requests: list[Request]) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        running = {name: Running(await open_sender(stack, urls[name])) for name in urls}
        freeze()
        for _ in range(options.rounds):
            for variant in running.values():
                variant.taken["capacity"].append(await saturate(variant.send, requests, CONCURRENCY))
                variant.taken["alone_ms"].append(await alone(variant.send, requests))
        rate = SHARE * statistics.median(next(iter(running.values())).taken["capacity"])
        for _ in range(options.rounds):
            for variant in running.values():
                samples = await drive(variant.send, requests, poisson(rate, len(requests)))
                variant.taken["level"].append(summary(samples, BOUND_SECONDS))
    return {name: figures(variant.taken, rate) for name, variant in running.items()}


def figures(taken: dict[str, list[Any]], rate: float) -> dict[str, float]:
    return {
        "capacity_per_second": round(statistics.median(taken["capacity"]), 2),
        "alone_p50_ms": round(statistics.median(taken["alone_ms"]), 1),
        "rate_per_second": round(rate, 2),
        **{name: round(statistics.median(level[name] for level in taken["level"]), 1) for name in ("p50_ms", "p99_ms")},
    }


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", default=str(BUNDLED), help="a checkpoint, or a preset with random weights")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--requests", type=count, default=150)
    parser.add_argument("--rounds", type=count, default=3)
    options = parser.parse_args()
    unwind_on_sigterm()
    with ExitStack() as stack:
        weights = weights_of(options.model, stack.enter_context(tempfile.TemporaryDirectory()))
        requests = texts(options.workload, options.requests, checkpoint.load(weights).tokenizer)
        urls: dict[str, list[str]] = {}
        for name in options.variants:
            variant = VARIANTS[name]
            os.environ.update(variant.environment)
            servers = [stack.enter_context(serving(weights, *variant.flags)) for _ in range(variant.servers)]
            urls[name] = [server.url for server in servers]
            for variable in variant.environment:
                del os.environ[variable]
        results = asyncio.run(measure(options, urls, requests))
    for name, row in results.items():
        print(f"{name:28}", row)
    record.finish("threads", options, results=results)


if __name__ == "__main__":
    main()
