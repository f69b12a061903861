"""What the benchmark of the front end measures."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from benchmarks import BUNDLED
from benchmarks.front_end import bare_server, instant_server, measure, until_all_ready
from benchmarks.load import Request


@pytest.mark.e2e
@pytest.mark.parametrize("n_workers", [0, 1])
def test_the_model_is_not_part_of_it(n_workers: int) -> None:
    """The backend in its place finds every mask equally likely to be the same word, and that at once."""
    with instant_server(n_workers, BUNDLED) as target:
        asyncio.run(until_all_ready(target.url))
        answer = httpx.post(f"{target.url}/denoise", json={"text": "A [MASK] for a [MASK] ."}, timeout=30).json()
    assert answer["steps"] == 1
    assert [one["probability"] for one in answer["restored"]] == [0.5, 0.5]


@pytest.mark.e2e
def test_the_library_alone_answers_the_same_calls() -> None:
    requests = [Request("A [MASK] .", max_steps=1, n_tokens=5, n_masked=1)] * 20
    with bare_server() as target:
        row = asyncio.run(measure("grpc", target, requests, concurrency=2))
    assert (row["transport"], row["workers"]) == ("grpc", "bare")
    assert row["requests_per_second"] > 0
