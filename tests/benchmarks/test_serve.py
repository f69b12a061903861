from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest

from benchmarks import serve
from benchmarks.load import Request, Sample
from benchmarks.serve import Bench, overload, settled

RATE, SECONDS = 60.0, 0.5
N = round(RATE * SECONDS)


class Healthy:
    """In place of the connection for probes, and of the server's process."""

    async def exchange(self, _method: str, _path: str) -> tuple[int, bytes]:
        return 200, b""

    def resident_mb(self) -> float:
        return 100.0


async def test_overload_counts_no_answer_that_came_when_the_flood_was_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request is answered at once, the others when the last one has been sent."""
    monkeypatch.setattr(serve, "PROBE_SECONDS", 0.1)
    n_sent, all_sent = 0, asyncio.Event()

    async def send(_request: Request) -> None:
        nonlocal n_sent
        n_sent += 1
        if n_sent == N:
            all_sent.set()
        if n_sent > 1:
            await all_sent.wait()

    fake: Any = Healthy()
    bench = Bench(Namespace(overload_seconds=SECONDS), fake, fake, {}, [Request("a [MASK]", 2, 4, 1)])
    figures = await overload(bench, send, RATE, bound=60.0)
    assert figures["requests"] == N
    assert figures["answered_per_second"] == pytest.approx(figures["offered_per_second"] / N, abs=0.01)
    assert figures["refused"] == figures["probe_errors"] == 0


async def test_a_flood_of_a_moment_is_one_request_and_one_probe_at_the_least() -> None:
    """Else what was measured before it would be lost."""

    async def send(_request: Request) -> None:
        pass

    fake: Any = Healthy()
    bench = Bench(Namespace(overload_seconds=0.001), fake, fake, {}, [Request("a [MASK]", 2, 4, 1)])
    figures = await overload(bench, send, RATE, bound=60.0)
    assert figures["requests"] == 1
    assert figures["probe_errors"] == 0


def test_what_arrives_before_the_steady_state_is_left_out_and_so_is_its_time() -> None:
    samples = [Sample(arrival, 0.25, ok=True, status="ok") for arrival in (0.5, 1.0, 4.0)]
    assert settled(samples, 1.0) == [Sample(arrival, 0.25, ok=True, status="ok") for arrival in (0.0, 3.0)]
