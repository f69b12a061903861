"""`python -m benchmarks.peers`: the same weights behind other servers' dynamic batching, same requests, same client.

Each peer lives in an environment of its own, made on first use. A sweep turns one knob after another (threads
and workers, batch size, how long a batch waits) and keeps what gives most requests a second. Then, in turn and
several rounds, every peer at its best and our server at its defaults: capacity (closed loop) and latency (open
loop, the same Poisson arrivals for all, at a share of the best peer's capacity). One server runs at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.files import names_files
from benchmarks.load import (
    Request,
    Sample,
    Send,
    Unsuccessful,
    drive,
    freeze,
    milliseconds,
    percentile,
    poisson,
    rest_sender,
    saturate,
    texts,
)
from benchmarks.options import count, positive
from benchmarks.peer_servers.setting import Setting
from benchmarks.peer_servers.start import FIRST, package, python_of, running
from benchmarks.server import serving, unwind_on_sigterm, weights_of
from benchmarks.workloads import WORKLOADS
from rdt_core import PRESETS, checkpoint

PEERS = ("litserve", "ray", "mosec")
OURS = "ours"
SERVER_FLAGS = ("threads", "token_budget", "max_live")
Knob = tuple[dict[str, Any], ...]
LAYOUTS: Knob = (
    {"threads": 2, "workers": 1, "spin": 1},
    {"threads": 2, "workers": 1, "spin": 0},
    {"threads": 1, "workers": 2, "spin": 1},
)
SIZES: Knob = tuple({"batch_size": size} for size in (1, 2, 4, 8, 16, 32))
TIMEOUTS: Knob = tuple({"batch_timeout": seconds} for seconds in (0.01, 0.05))
KNOBS = (LAYOUTS, SIZES, LAYOUTS, SIZES, TIMEOUTS)
"""Turned one after another, the first two once more: which layout is best depends on the size, and the reverse."""

Start = Callable[[], AbstractContextManager[str]]
"""Starts a server; the value is its URL."""


@dataclass(frozen=True)
class Round:
    """One contender, measured once: requests a second by concurrency, and what became of Poisson arrivals."""

    rates: dict[int, float]
    samples: list[Sample]

    @property
    def capacity(self) -> float:
        return max(self.rates.values())


def sweep(name: str, weights: Path, requests: Sequence[Request], concurrency: int) -> dict[Setting, float]:
    """Requests a second of the settings tried. Each knob is turned with those before it at their best."""
    tried: dict[Setting, float] = {}
    best = Setting(batch_size=1)
    for knob in KNOBS:
        for setting in (replace(best, **values) for values in knob):
            if setting not in tried:
                tried[setting] = measure(partial(running, name, setting, weights), requests, [concurrency]).capacity
                print(f"  {tried[setting]:6.2f}/s  {setting}", flush=True)
        best = max(tried, key=tried.__getitem__)
    return tried


def measure(
    start: Start, requests: Sequence[Request], concurrencies: Sequence[int], arrivals: Sequence[float] = ()
) -> Round:
    """Start a server, warm all of its workers, measure, stop it."""

    async def measured(url: str) -> Round:
        async with rest_sender(url) as send:
            n = max(concurrencies)
            await saturate(send, [*[FIRST] * n, *requests[:n]], n)
            samples = await drive(send, requests[: len(arrivals)], arrivals)
            return Round({n: await rate(send, requests, n) for n in concurrencies}, samples)

    with start() as url:
        return asyncio.run(measured(url))


async def rate(send: Send[Request], requests: Sequence[Request], concurrency: int) -> float:
    """Requests a second; none if one of them failed."""
    try:
        return await saturate(send, requests, concurrency)
    except* (Unsuccessful, OSError, EOFError) as failed:
        print(f"  with {concurrency} at a time: {failed.exceptions[0]!r}", flush=True)
    return 0.0


@contextmanager
def ours(weights: Path, flags: Sequence[str]) -> Iterator[str]:
    with serving(weights, *flags) as server:
        yield server.url


def report(rounds: Sequence[Round], own: Sequence[Round]) -> dict[str, Any]:
    """Medians over rounds, latencies of all rounds together; ratios say how many times better ours is."""
    answered, owned = ([s.latency for r in rs for s in r.samples if s.ok] for rs in (rounds, own))
    return {
        "capacity_per_second": round(statistics.median(r.capacity for r in rounds), 2),
        "by_concurrency": {n: [round(r.rates[n], 2) for r in rounds] for n in rounds[0].rates},
        **{f"p{percent}_ms": milliseconds(percentile(answered, percent)) for percent in (50, 99)},
        "failed": sum(not sample.ok for r in rounds for sample in r.samples),
        "ours_over": {
            "capacity": ratio([o.capacity for o in own], [r.capacity for r in rounds]),
            **{f"p{p}": ratio([percentile(answered, p)], [percentile(owned, p)]) for p in (50, 99)},
        },
    }


def ratio(numerators: Sequence[float | None], denominators: Sequence[float | None]) -> float | None:
    """The median of the quotients, pair by pair; None if one cannot be had."""
    pairs = list(zip(numerators, denominators, strict=True))
    return round(statistics.median(n / d for n, d in pairs if n and d), 2) if all(n and d for n, d in pairs) else None


def compare(options: argparse.Namespace, weights: Path) -> dict[str, Any]:
    tokenizer = checkpoint.load(weights).tokenizer
    swept: dict[str, dict[Setting, float]] = {}
    trial = texts(options.workload, options.sweep_requests, tokenizer, seed=1)
    freeze()
    for name in options.peers:
        print(package(name), flush=True)
        swept[name] = sweep(name, weights, trial, max(options.concurrencies))
    best = {name: max(tried, key=tried.__getitem__) for name, tried in swept.items()}
    offered = options.share * max(max(tried.values()) for tried in swept.values())
    flags = [f"--{flag}={value}" for flag in SERVER_FLAGS if (value := getattr(options, flag)) is not None]
    starts: dict[str, Start] = {name: partial(running, name, setting, weights) for name, setting in best.items()}
    starts[OURS] = partial(ours, weights, flags)
    requests = texts(options.workload, options.requests, tokenizer)
    rounds: dict[str, list[Round]] = {name: [] for name in starts}
    for seed in range(options.rounds):
        for name, start in starts.items():
            arrivals = poisson(offered, len(requests), seed)
            rounds[name].append(measure(start, requests, options.concurrencies, arrivals))
            print(f"round {seed + 1}  {name}  {rounds[name][-1].capacity:.2f}/s", flush=True)
    return {
        "offered_per_second": round(offered, 2),
        "peers": {
            name: {
                "package": package(name),
                "best": asdict(best[name]),
                "sweep": [{**asdict(setting), "per_second": round(n, 2)} for setting, n in swept[name].items()],
            }
            for name in options.peers
        },
        "results": {name: report(own, rounds[OURS]) for name, own in rounds.items()},
    }


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", default="base", help=f"a checkpoint, or random weights: {', '.join(PRESETS)}")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    least = max(one["workers"] for one in LAYOUTS) * max(one["batch_size"] for one in SIZES)
    swept = f"per setting of the sweep; with fewer than {least} a worker has nothing to do where batches are largest"
    parser.add_argument("--sweep-requests", type=count, default=least, help=swept)
    parser.add_argument("--requests", type=count, default=128, help="per measurement of a round")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--concurrencies", nargs="+", type=count, default=[32, 64], help="the best counts")
    parser.add_argument("--share", type=positive, default=0.6, help="offered for latency, of the best peer's capacity")
    for flag in SERVER_FLAGS:
        parser.add_argument(f"--{flag.replace('_', '-')}", type=count, help="of our server; its default if not given")
    options = parser.parse_args()
    unwind_on_sigterm()
    for name in options.peers:
        python_of(name)
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(options, weights_of(options.model, folder))
    for name, result in figures["results"].items():
        print(name, *(f"{figure} {value}" for figure, value in result.items()), sep="\n  ")
    record.finish("peers", options, **figures)


if __name__ == "__main__":
    main()
