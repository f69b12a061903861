"""`python -m benchmarks.front_end`: the front end alone, in one process and in several.

Whatever parses, validates, tokenises and writes answers is the product's; the model is not: a backend in its place
answers every sequence after one pass, at once. What is left is the time a fast GPU would wait for.

Client and server share the machine. With fewer cores than processes the rate cannot grow with workers, and says
little; what does is the processor time that each process spends on a request (`*_us`): on cores of their own, a
worker answers at most a second's worth of `worker_us` a second, and the engine's process can feed at most a second's
worth of `engine_us` to the card, however many workers there are.

`bare` is the gRPC library alone: a server of its own that sends the same bytes to every call, unread. No front end
that answers over it in one process can be faster.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from benchmarks import BUNDLED, record
from benchmarks.files import names_files
from benchmarks.load import Http, Request, freeze, grpc_sender, rest_sender, saturate, texts
from benchmarks.options import count, natural
from benchmarks.server import read, serving, unwind_on_sigterm
from rdt_core import Tokenizer, checkpoint
from service import hosting
from service.engine.types import Choice, Outcome, Plan, Reading
from service.process import loop
from service.rpc.convert import SERVICE
from service.rpc.pb import denoiser_pb2 as pb

ROOM = ("--token_budget=16384", "--max_live=1024", "--max_waiting=4096", "--max_waiting_tokens=1000000")
TICK = os.sysconf("SC_CLK_TCK")
CONNECTIONS = 16
"""Of gRPC: all calls of one go to one worker."""
WARM_REQUESTS = 300
PROBES = 30
WORD = 2000
"""A token that is some word."""

BARE = "bare"
"""Stands in the place of a number of workers for the gRPC library alone."""


class InstantBackend:
    """Reads every mask as the same word, after one pass."""

    ticks_late = 0

    def __init__(self, *_: object) -> None:
        pass

    def run(self, plan: Plan) -> Outcome:
        readings = {}
        for admission in plan.admitted:
            rows = (row for row, masked in enumerate(admission.job.masked) if masked)
            readings[admission.ticket] = Reading(0.5, "max_steps", [Choice(row, WORD, 0.5, []) for row in rows], [])
        return Outcome(readings, n_decoded=sum(len(reading.chosen) for reading in readings.values()))

    def reset(self) -> None:
        pass


@dataclass(frozen=True)
class Target:
    url: str  # "": no REST
    rpc_address: str
    engine: int  # process
    workers: tuple[int, ...]

    def seconds(self) -> tuple[float, float]:
        """Processor time that the engine's process and the workers have taken."""
        return cpu_seconds(self.engine), sum(map(cpu_seconds, self.workers))


def cpu_seconds(pid: int) -> float:
    """As Linux counts it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@contextmanager
def instant_server(n_workers: int, weights: Path) -> Iterator[Target]:
    """A server with a backend that answers at once; killed at the end, and its children end with it."""
    flags = [f"--api_workers={n_workers}", "--replicas=1", "--device=cpu", *ROOM]
    with serving(weights, *flags, module=("benchmarks.front_end", "--serve")) as server:
        while (said := read(server.log)).count("listening on http") < n_workers:
            if server.process.poll() is not None:
                raise RuntimeError("not all workers listen")
            time.sleep(0.05)
        children = {name: int(pid) for name, pid in re.findall(r"started (.*) as process (\d+)", said)}
        engine = children.pop("engine", server.process.pid)
        yield Target(server.url, server.rpc_address, engine, tuple(children.values()))


@contextmanager
def bare_server() -> Iterator[Target]:
    command = [sys.executable, "-m", "benchmarks.front_end", "--bare"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Target("", f"127.0.0.1:{int(process.stdout.readline())}", process.pid, ())
        finally:
            process.kill()


async def serve_bare() -> int:
    answer = pb.DenoiseResponse(text="word " * 30, steps=1, max_steps=1, halt_reason="max_steps").SerializeToString()

    async def denoise(_message: bytes, _context: object) -> bytes:
        return answer

    server = grpc.aio.server()
    calls: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Denoise": grpc.unary_unary_rpc_method_handler(denoise)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()
    return 0


def serve(arguments: Sequence[str] | None) -> int:
    """The product with `InstantBackend`; without arguments, one of its child processes."""
    from service import cli  # noqa: PLC0415 - the product, in a process of its own
    from service.workers import __main__ as child  # noqa: PLC0415
    from service.workers.children import Child  # noqa: PLC0415

    Child.command = (sys.executable, "-P", "-m", "benchmarks.front_end", "--child")
    assert hasattr(hosting, "make_backend"), "the product chooses its backend elsewhere now"
    setattr(hosting, "make_backend", InstantBackend)  # noqa: B010 - it is imported there, not exported
    return child.main() if arguments is None else cli.serve(arguments)


async def until_all_ready(url: str) -> None:
    """Wait until all workers are ready: each connection may reach another one."""
    n_ready = 0
    async with asyncio.timeout(60):
        while n_ready < PROBES:
            async with Http(url) as http:
                status, _ = await http.exchange("GET", "/health/ready")
            n_ready = n_ready + 1 if status == 200 else 0
            await asyncio.sleep(0.01)


async def measure(transport: str, target: Target, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    """Closed loop over one transport."""
    sender = rest_sender(target.url) if transport == "rest" else grpc_sender(target.rpc_address, CONNECTIONS)
    if target.url:
        await until_all_ready(target.url)
    async with sender as send:
        await saturate(send, requests[:WARM_REQUESTS], concurrency)
        before, own = target.seconds(), time.process_time()
        rate = await saturate(send, requests, concurrency)
        after, client = target.seconds(), time.process_time() - own
    engine_us, worker_us = (round((b - a) / len(requests) * 1e6) for a, b in zip(before, after, strict=True))
    n_workers = len(target.workers) if target.url else BARE
    return {
        "transport": transport, "workers": n_workers, "requests_per_second": round(rate),
        "engine_us": engine_us, "worker_us": worker_us, "client_us": round(client / len(requests) * 1e6),
    }  # fmt: skip


@names_files
def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--serve"]:
        return serve(given[1:])
    if given == ["--child"]:
        return serve(None)
    if given == ["--bare"]:
        return loop.run(serve_bare())
    parser = record.parser(__doc__)
    parser.add_argument("--workers", type=natural, nargs="+", default=[0, 1, 2], help="0 is one process for all")
    parser.add_argument("--requests", type=count, default=3000)
    parser.add_argument("--concurrency", type=count, default=64)
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    options = parser.parse_args(given)
    unwind_on_sigterm()

    tokenizer = Tokenizer(checkpoint.read(options.weights).tokenizer)
    requests = [replace(request, max_steps=1) for request in texts("mixed", options.requests, tokenizer)]
    freeze()
    rows = []
    print("transport  workers  requests/s  engine us  workers us  client us  (processor time a request)")
    for n_workers in (BARE, *options.workers):
        with bare_server() if n_workers == BARE else instant_server(n_workers, options.weights) as target:
            for transport in ("rest", "grpc") if target.url else ("grpc",):
                row = asyncio.run(measure(transport, target, requests, options.concurrency))
                rows.append(row)
                print(
                    f"{transport:9}  {n_workers:7}  {row['requests_per_second']:10}  {row['engine_us']:9}  "
                    f"{row['worker_us']:10}  {row['client_us']:9}", flush=True,
                )  # fmt: skip
    record.finish("front_end", options, load_average=os.getloadavg()[0], rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
