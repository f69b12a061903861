"""Requests to measure with: lengths, masks and depths, the same for every contender and every run.

Depths are forced (`threshold=0` and a `max_steps` of each request's own), so that every contender does
the same work. They follow the mask ratio as published for recursive denoisers on WikiText: 2.4 passes
at 10 % masking to 13.8 at 90 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from service.engine.types import Job

DEPTHS = {0.1: 2, 0.2: 4, 0.3: 5, 0.5: 8, 0.7: 11, 0.9: 14}
EASY, HARD, DEEP = 2, 14, 16
FIRST_WORD_ID = 1000  # below are special and unused entries of BERT's vocabulary
MASK_ID = 103


def mixed(rng: random.Random) -> tuple[float, int]:
    ratio = rng.choice(tuple(DEPTHS))
    return ratio, DEPTHS[ratio]


def easy(_rng: random.Random) -> tuple[float, int]:
    return 0.1, EASY


def bimodal(rng: random.Random) -> tuple[float, int]:
    return (0.1, EASY) if rng.random() < 0.8 else (0.9, HARD)


def deep(_rng: random.Random) -> tuple[float, int]:
    return 0.5, DEEP


WORKLOADS: dict[str, Callable[[random.Random], tuple[float, int]]] = {
    "mixed": mixed,
    "easy": easy,
    "bimodal": bimodal,
    "deep": deep,
}


def draw_length(rng: random.Random) -> int:
    """Lognormal with median 32, kept within 8 and 128."""
    return max(8, min(128, round(32 * math.exp(rng.gauss(0.0, 0.7)))))


def make_jobs(name: str, n: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """`n` requests of a workload: random words, masks at random places."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(n):
        length = draw_length(rng)
        ratio, depth = WORKLOADS[name](rng)
        places = set(rng.sample(range(1, length - 1), max(1, round(ratio * (length - 2)))))
        tokens = [MASK_ID if row in places else rng.randrange(FIRST_WORD_ID, vocab_size) for row in range(length)]
        jobs.append(Job(tokens, [row in places for row in range(length)], depth, threshold=0.0, halting="gate"))
    return jobs
