"""What becomes of a request that has failed: nothing of it stays until the garbage collector comes by."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path

import pytest

from rdt_core import ModelConfig, Tokenizer
from service.engine.scheduler import SchedulerLimits
from service.errors import DeadlineExceeded
from service.process import garbage
from service.settings import Settings
from tests.service.engine.scripted import HeldBackend
from tests.service.workers.fleet import Fleet, OneEngine, brief, denoiser_of, running

LIMITS = SchedulerLimits(token_budget=32, max_live=1, max_waiting=3, max_waiting_tokens=100)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("in_a_worker", [False, True])
async def test_a_request_that_is_too_late(
    tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig, in_a_worker: bool, streams: bool
) -> None:
    held = HeldBackend()
    host = OneEngine([held], LIMITS)
    denoiser = denoiser_of(tiny_tokenizer, tiny_config, host.engine)
    async with running(Fleet(tmp_path / "engine", host, Settings()), denoiser) as fleet:
        if in_a_worker:
            denoiser = (await fleet.worker()).lifecycle.denoiser
        busy = asyncio.create_task(denoiser.denoise(denoiser.read(brief(max_steps=10**6)), "rest"))
        await asyncio.to_thread(held.wait_until_started)
        request = denoiser.read(brief(timeout_ms=1))
        kept, late = weakref.ref(request), False
        with garbage.left_alone():
            try:
                if streams:
                    async for _ in denoiser.denoise_stream(request, "rest"):
                        pass
                else:
                    await denoiser.denoise(request, "rest")
            except DeadlineExceeded:
                late = True
            del request
            for _ in range(5):
                await asyncio.sleep(0)
            is_kept = kept() is not None
        busy.cancel()
        held.let_go(1000)
    assert late
    assert not is_kept
