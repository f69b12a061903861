"""What logits say: the best token of each row, how probable it is, and what else it could be.

M: rows   V: vocabulary   K: candidates
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

LEAST_TOP = 32
"""The fewest candidates that are looked for, however few are asked for: see `top_first`."""


class Read(NamedTuple):
    """Of each row, the most likely tokens; probabilities are those of the softmax over the vocabulary."""

    tokens: Tensor  # (M,)
    probabilities: Tensor  # (M,)
    top_tokens: Tensor  # (M, K) the token itself first
    top_probabilities: Tensor  # (M, K)


def read_logits(logits: Tensor, top_k: int) -> Read:
    """logits `(M, V)`, which are overwritten. Ranked by logit: probabilities may be equal where logits are not."""
    logits = logits.float()
    total = logits.logsumexp(-1)  # (M,)
    best, tokens = logits.max(-1)
    values, indices = top_first(logits, tokens, top_k)
    return Read(tokens, (best - total).exp(), indices, (values - total[:, None]).exp())


def top_first(scores: Tensor, best: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of each row `(M, V)`, with `best` `(M,)` first among equals: `(M, k)` values, `(M, k)` indices.

    `max` and `topk` choose differently among equals, so `best` is put first. What `topk` chooses depends on its `k`
    too, which in a batch is the largest that anybody asks for: so it is always asked for at least `LEAST_TOP`.
    Overwrites `scores`, because copying whole vocabularies is slow.
    """
    if k == 0:
        return scores.new_zeros(len(scores), 0), best.new_zeros(len(scores), 0)
    at = best[:, None]
    highest = scores.gather(1, at)  # (M, 1)
    scores.scatter_(1, at, math.inf)  # assigning by index would wait for the device
    values, indices = scores.topk(min(max(k, LEAST_TOP), scores.shape[1]), dim=-1)
    values[:, :1] = highest
    return values[:, :k], indices[:, :k]
