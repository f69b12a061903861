"""Who watches the passes of a job from a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rdt_core import ModelConfig, Tokenizer
from service.engine.protocol import OnReading
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Reading, Result
from service.errors import Internal
from service.settings import Settings
from service.workers.worker import Worker
from tests.service.engine.scripted import ScriptedBackend, scripted_job
from tests.service.workers.fleet import Fleet, OneEngine, denoiser_of, running

LIMITS = SchedulerLimits(token_budget=32, max_live=4, max_waiting=8, max_waiting_tokens=100)


@pytest.fixture
async def worker(tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> AsyncIterator[Worker]:
    host = OneEngine([ScriptedBackend()], LIMITS)
    denoiser = denoiser_of(tiny_tokenizer, tiny_config, host.engine)
    async with running(Fleet(tmp_path / "engine", host, Settings()), denoiser) as fleet:
        yield await fleet.worker()


async def submit(worker: Worker, on_reading: OnReading) -> Result:
    engine = worker.lifecycle.denoiser.engine
    with engine.reserve() as place:
        return await engine.submit(scripted_job(4, depth=50), place, on_reading)


async def test_an_observer_that_fails_fails_alone(worker: Worker) -> None:
    """The connection to the engine is everybody's."""
    seen: list[Reading] = []

    def fails(reading: Reading) -> None:
        raise KeyError(reading)

    failed, result = await asyncio.gather(
        submit(worker, fails), submit(worker, seen.append), return_exceptions=True
    )  # fmt: skip
    assert isinstance(failed, Internal)
    assert isinstance(result, Result)
    assert result.steps == len(seen) == 50
    assert worker.lifecycle.state == "ready"
