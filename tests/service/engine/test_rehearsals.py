"""The ticks that a server runs before its first request."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.engine.scheduler import SchedulerLimits
from service.engine.types import Job
from service.hosting import FEW_TOKENS, WARM_TICKS, WARM_TOKENS, rehearsals

LONGEST = 256


def ticks_on(device: str, **limits: int) -> list[list[Job]]:
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=LONGEST), device=torch.device(device))
    loaded: Any = SimpleNamespace(model=model, tokenizer=SimpleNamespace(mask_id=4, cls_id=2))
    bounds = {"max_live": 64, "max_waiting": 1, "max_waiting_tokens": 1} | limits
    return rehearsals(loaded, SchedulerLimits(**bounds))


def sizes(ticks: list[list[Job]]) -> list[int]:
    return [sum(len(job.tokens) for job in tick) for tick in ticks]


@pytest.mark.parametrize(
    ("device", "budget", "heaviest"),
    [("cpu", 512, [512]), ("cpu", 8192, [8192]), ("cuda", 1100, [1024, 512, 256]), ("cpu", 256, [256])],
)
def test_the_heaviest_comes_first_and_on_cuda_its_halves(device: str, budget: int, heaviest: list[int]) -> None:
    ticks = ticks_on(device, token_budget=budget)
    assert sizes(ticks)[: len(heaviest)] == heaviest
    for tick in ticks[: len(heaviest)]:
        assert all(all(job.masked) and len(job.tokens) == LONGEST for job in tick)
        assert all(set(job.tokens) == {4} for job in tick)
    assert not any(all(job.masked) for tick in ticks[len(heaviest) :] for job in tick), "and then what is usual"


def test_no_tick_has_more_texts_than_may_be_live() -> None:
    ticks = ticks_on("cpu", token_budget=8192, max_live=3)
    assert max(len(tick) for tick in ticks) == 3
    assert max(sizes(ticks)) == 3 * LONGEST


@pytest.mark.parametrize("budget", [512, 1000, 16_384])
def test_then_each_size_down_to_one_short_text(budget: int) -> None:
    _, *usual = ticks_on("cpu", token_budget=budget)
    found, most = sizes(usual), min(budget, WARM_TOKENS)
    assert found[0] == most
    assert found[-3:] == list(FEW_TOKENS) == [16, 8, 4]
    steps = found[:-3]
    assert len(steps) == pytest.approx(WARM_TICKS, abs=1)
    for large, small in pairwise(steps):
        lost = 2  # at most: so few tokens are no text
        assert 0 <= large - small <= most // WARM_TICKS + lost
    for job in (job for tick in usual for job in tick):
        assert 2 < len(job.tokens) <= LONGEST
        assert [token == 4 for token in job.tokens] == job.masked
        assert sum(job.masked) == math.ceil((len(job.tokens) - 1) / 8), "one in eight is masked"
        assert (job.max_steps, job.threshold, job.halting) == (2, math.inf, "gate")
