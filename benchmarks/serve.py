"""`python -m benchmarks.serve`: the real server in a process of its own, real clients on loopback.

front end   what a transport adds to the bare engine while nothing else is going on
capacity    closed loop: the most requests a second
levels      open loop, Poisson arrivals at shares of that capacity
overload    open loop at ten times the capacity: refusals, probes and memory

The client shares the machine with the server. With a lower priority it would wait for its turn and count that as
the server's latency, so it has the same priority, is cheap instead, and reports what it took (`client_cores`).
Flags that are not listed here go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import BUNDLED, record
from benchmarks.files import names_files
from benchmarks.load import (
    Http,
    Request,
    Sample,
    Send,
    Unsuccessful,
    drive,
    freeze,
    grpc_sender,
    milliseconds,
    percentile,
    poisson,
    rest_sender,
    saturate,
    summary,
    texts,
)
from benchmarks.options import amount, count, positive
from benchmarks.server import Server, serving, unwind_on_sigterm, weights_of
from benchmarks.workloads import WORKLOADS
from rdt_core import PRESETS, RDT, Tokenizer, checkpoint
from rdt_core.precision import prepare
from service.engine.eager import EagerBackend
from service.engine.engine import BatchingEngine
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job

SHARED_FLAGS = ("threads", "token_budget", "max_live")
CONCURRENCIES = (16, 32, 64)
FRONT_END_REQUESTS = 100
BOUND_FACTOR = 5
OVERLOAD = 10
REFUSALS = ("429", "RESOURCE_EXHAUSTED")
REFUSAL_BOUND_MS, PROBE_BOUND_MS = 50, 100
PROBE_PATHS = ("/health/live", "/metrics")
PROBE_SECONDS = 0.5
EARLY_SECONDS = 10.0
"""By then queue, connections and buffers are full, and memory should no longer grow."""
COLUMNS = ("share", "offered_per_second", "answered_per_second", "goodput_per_second", "p50_ms", "p90_ms", "p99_ms",
           "mean_tick_tokens", "mean_tick_ms", "errors")  # fmt: skip

SENDERS: dict[str, Callable[[Server], AbstractAsyncContextManager[Send[Request]]]] = {
    "rest": lambda server: rest_sender(server.url),
    "grpc": lambda server: grpc_sender(server.rpc_address),
}


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    options: argparse.Namespace
    server: Server
    http: Http  # for the server's own figures
    senders: Mapping[str, Send[Request]]
    requests: Sequence[Request]


async def front_end(bench: Bench, model: RDT, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """One request after another, in turn over each transport and to an engine in this process."""
    limits = SchedulerLimits(bench.options.token_budget, bench.options.max_live, 1, bench.options.token_budget)
    engine = BatchingEngine([EagerBackend(model)], limits)
    jobs = {request: job_of(request, tokenizer) for request in bench.requests}

    async def compute(request: Request) -> None:
        with engine.reserve() as place:
            await engine.submit(jobs[request], place)

    await engine.start()
    contenders = [("engine", compute), *bench.senders.items()]
    taken: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for turn, request in enumerate(bench.requests[:FRONT_END_REQUESTS]):
        first = turn % len(contenders)
        for name, send in contenders[first:] + contenders[:first]:
            began = time.perf_counter()
            await send(request)
            taken[name].append(time.perf_counter() - began)
    await engine.stop()
    bare = taken["engine"]
    return {
        name: {
            "p50_ms": round(statistics.median(times) * 1e3, 2),
            "added_ms": round(statistics.median(t - b for t, b in zip(times, bare, strict=True)) * 1e3, 2),
        }
        for name, times in taken.items()
    }


def job_of(request: Request, tokenizer: Tokenizer) -> Job:
    encoding = tokenizer.encode(request.text)
    return Job(encoding.ids, encoding.masked, request.max_steps, request.threshold, halting="gate")


async def transport(bench: Bench, send: Send[Request], bound: float) -> dict[str, Any]:
    """Capacity, levels and overload of one transport."""
    rates = {concurrency: await saturate(send, bench.requests, concurrency) for concurrency in CONCURRENCIES}
    concurrency, capacity = max(rates.items(), key=lambda item: item[1])
    print(f"  capacity {capacity:.2f}/s with {concurrency} at a time", flush=True)
    figures: dict[str, Any] = {"capacity_per_second": round(capacity, 2), "concurrency": concurrency}
    print(" ", *COLUMNS)
    figures["levels"] = [await level(bench, send, share, share * capacity, bound) for share in bench.options.levels]
    if bench.options.overload_seconds > 0:
        figures["overload"] = await overload(bench, send, OVERLOAD * capacity, bound)
    return figures


async def level(bench: Bench, send: Send[Request], share: float, rate: float, bound: float) -> dict[str, Any]:
    """Random arrivals for a while. The first tenth of the time is not counted, until the queue is in a steady state."""
    n = max(1, round(rate * bench.options.seconds))
    before = await tick_totals(bench.http)
    samples = await drive(send, islice(cycle(bench.requests), n), poisson(rate, n))
    after = await tick_totals(bench.http)
    spent = {name: after[name] - before[name] for name in after}
    figures = {
        "share": share,
        "sent": n,
        **summary(settled(samples, bench.options.seconds / 10) or samples, bound),
        "mean_tick_tokens": round(spent["tokens_sum"] / spent["tokens_count"], 1),
        "mean_tick_ms": round(spent["duration_seconds_sum"] / spent["duration_seconds_count"] * 1e3, 2),
    }
    print(" ", *(f"{figures[name]!s:>{len(name)}}" for name in COLUMNS), flush=True)
    return figures


def settled(samples: Sequence[Sample], after: float) -> list[Sample]:
    """Those that arrived after so many seconds, on a clock that starts then."""
    return [replace(sample, arrival=sample.arrival - after) for sample in samples if sample.arrival >= after]


async def tick_totals(http: Http) -> dict[str, float]:
    """Sums and counts of the server's histograms of ticks."""
    _, content = await http.exchange("GET", "/metrics")
    return {name: float(n) for name, n in re.findall(r"^rdt_tick_(\w+) (\S+)$", content.decode(), re.MULTILINE)}


async def overload(bench: Bench, send: Send[Request], rate: float, bound: float) -> dict[str, Any]:
    """Far more than can be served: what is refused is refused at once, and the probes are still answered."""
    seconds = bench.options.overload_seconds
    n, n_probes = (max(1, round(each)) for each in (rate * seconds, seconds / PROBE_SECONDS))

    async def probe(path: str) -> None:
        status, _ = await bench.http.exchange("GET", path)
        if status != 200:
            raise Unsuccessful(str(status))

    began, cpu_began = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        memory = group.create_task(resident(bench.server, seconds))
        answers = group.create_task(drive(send, islice(cycle(bench.requests), n), poisson(rate, n)))
        moments = [i * PROBE_SECONDS for i in range(n_probes)]
        probes = {path: group.create_task(drive(probe, [path] * n_probes, moments)) for path in PROBE_PATHS}
    client_cores = (time.process_time() - cpu_began) / (time.perf_counter() - began)
    samples, seen = answers.result(), {path: probed.result() for path, probed in probes.items()}
    refusals = [sample.latency for sample in samples if sample.status in REFUSALS]
    figures = {
        **summary(samples, bound, while_arriving=True),
        "refused": len(refusals),
        "refused_p99_ms": milliseconds(percentile(refusals, 99)),
        "probe_max_ms": {path: milliseconds(max(probe.latency for probe in probed)) for path, probed in seen.items()},
        "probe_errors": sum(not probe.ok for probed in seen.values() for probe in probed),
        "resident_mb": memory.result(),
        "client_cores": round(client_cores, 2),
    }
    print(f"  overload (refused p99 <= {REFUSAL_BOUND_MS} ms, probes <= {PROBE_BOUND_MS} ms)")
    print(*(f"    {name} {value}" for name, value in figures.items()), sep="\n", flush=True)
    return figures


async def resident(server: Server, seconds: float) -> list[float]:
    """Megabytes at the start, after ten seconds, at the end."""
    early = min(EARLY_SECONDS, seconds)
    sizes = [server.resident_mb()]
    for pause in (early, seconds - early):
        await asyncio.sleep(pause)
        sizes.append(server.resident_mb())
    return sizes


async def measure(options: argparse.Namespace, server: Server, weights: Path) -> dict[str, Any]:
    loaded = checkpoint.load(weights)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http(server.url))
        senders = {name: await stack.enter_async_context(SENDERS[name](server)) for name in options.transports}
        requests = texts(options.workload, options.requests, loaded.tokenizer)
        bench = Bench(options, server, http, senders, requests)
        freeze()
        added = await front_end(bench, prepare(loaded.model), loaded.tokenizer)
        print("front end", added)
        bound = options.bound or BOUND_FACTOR * max(figures["p50_ms"] for figures in added.values()) / 1e3
        print(f"bound {bound:.3f} s")
        figures = {}
        for name, send in senders.items():
            print(name)
            figures[name] = await transport(bench, send, bound)
    return {"front_end": added, "bound_seconds": round(bound, 3), "transports": figures}


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", default=str(BUNDLED), help=f"a checkpoint, or random weights: {', '.join(PRESETS)}")
    parser.add_argument("--transports", nargs="+", choices=SENDERS, default=list(SENDERS))
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--requests", type=count, default=200, help="different ones; capacity is that of all at once")
    parser.add_argument("--seconds", type=positive, default=60.0, help="per level")
    parser.add_argument("--levels", nargs="*", type=positive, default=[0.3, 0.6, 0.8, 0.95], help="shares of capacity")
    parser.add_argument("--bound", type=positive, help=f"seconds for goodput (default: {BOUND_FACTOR} x unloaded p50)")
    parser.add_argument("--overload-seconds", type=amount, default=60.0, help="0 to skip")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--token-budget", type=count, default=512)
    parser.add_argument("--max-live", type=count, default=64)
    options, flags = parser.parse_known_args()
    options.server_flags = [f"--{name}={getattr(options, name)}" for name in SHARED_FLAGS] + flags
    torch.set_num_threads(options.threads)
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_of(options.model, folder)
        with serving(weights, *options.server_flags) as server:
            figures = asyncio.run(measure(options, server, weights))
    record.finish("serve", options, **figures)


if __name__ == "__main__":
    main()
