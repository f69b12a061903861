"""Requests to measure with: lengths, masks and depths, the same for every contender and every run.

Depths are forced (`threshold=0` and a `max_steps` of each request's own), so that every contender does
the same work. They follow the mask ratio as published for recursive denoisers on WikiText: 2.4 passes
at 10 % masking to 13.8 at 90 %.

    mixed    all mask ratios alike
    easy     every request shallow
    bimodal  four in five shallow, the others deep
    deep     every request deep and equally long: nothing to gain, so whatever is lost is overhead
    gate     real text, depths by the model's own gate (`gate_jobs`)
    settle   as mixed, written back pass by pass; where there are fewer masks than passes, in fewer (`settle_jobs`)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from service.engine.types import Job

DEPTHS = {0.1: 2, 0.2: 4, 0.3: 5, 0.5: 8, 0.7: 11, 0.9: 14}
EASY, HARD, DEEP = 2, 14, 16
DEEP_LENGTH = 32
FIRST_WORD_ID = 1000  # below are special and unused entries of BERT's vocabulary
CLS_ID, SEP_ID, MASK_ID = 101, 102, 103


class Shape(NamedTuple):
    """What is drawn of a request before its words."""

    length: int  # tokens, [CLS] and [SEP] included
    mask_ratio: float
    depth: int

    @property
    def n_masked(self) -> int:
        return max(1, round(self.mask_ratio * (self.length - 2)))


def draw_length(rng: random.Random) -> int:
    """Lognormal with median 32, kept within 8 and 128."""
    return max(8, min(128, round(32 * math.exp(rng.gauss(0.0, 0.7)))))


def mixed(rng: random.Random) -> Shape:
    length = draw_length(rng)
    ratio = rng.choice(tuple(DEPTHS))
    return Shape(length, ratio, DEPTHS[ratio])


def easy(rng: random.Random) -> Shape:
    return Shape(draw_length(rng), 0.1, EASY)


def bimodal(rng: random.Random) -> Shape:
    length = draw_length(rng)
    return Shape(length, 0.1, EASY) if rng.random() < 0.8 else Shape(length, 0.9, HARD)


def deep(_rng: random.Random) -> Shape:
    return Shape(DEEP_LENGTH, 0.5, DEEP)


WORKLOADS: dict[str, Callable[[random.Random], Shape]] = {
    "mixed": mixed,
    "easy": easy,
    "bimodal": bimodal,
    "deep": deep,
}


def make_jobs(name: str, n: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """`n` requests of a workload: random words, masks at random places."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(n):
        shape = WORKLOADS[name](rng)
        words = [rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(shape.length - 2)]
        jobs.append(_masked(words, shape, rng))
    return jobs


def gate_jobs(tokens: Sequence[int], n: int, threshold: float, max_steps: int, seed: int = 0) -> list[Job]:
    """`n` requests cut from a text's tokens, masked as in `mixed`; the model's own gate says when each is done.

    Raises `ValueError` for a text of under 1,000 tokens.
    """
    if len(tokens) < 1000:
        raise ValueError(f"the text has {len(tokens)} tokens: want at least 1000")
    rng = random.Random(seed)
    jobs = []
    for _ in range(n):
        shape = mixed(rng)
        start = rng.randrange(len(tokens) - shape.length)
        job = _masked(list(tokens[start : start + shape.length - 2]), shape, rng)
        jobs.append(replace(job, max_steps=max_steps, threshold=threshold))
    return jobs


def settle_jobs(n: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """The requests of `mixed`, each settling over its passes (with a threshold of 0, only what is due)."""
    return [replace(job, halting="settle") for job in make_jobs("mixed", n, vocab_size, seed)]


def _masked(words: list[int], shape: Shape, rng: random.Random) -> Job:
    places = set(rng.sample(range(1, shape.length - 1), shape.n_masked))
    masked = [row in places for row in range(shape.length)]
    visible = [CLS_ID, *words, SEP_ID]
    tokens = [MASK_ID if is_masked else token for is_masked, token in zip(masked, visible, strict=True)]
    return Job(tokens, masked, shape.depth, threshold=0.0, halting="gate")
