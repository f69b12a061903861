"""Which tokens are masked: schedules, nested chains, and BERT's corruption.

A **schedule** maps a place in the chain, from 0 (clean) to 1 (all masked), to a mask ratio. A **chain** gives every
maskable token a rank; step `k` of `n` masks the tokens whose rank is below `ratio(k / n)`, so what is visible at a
step stays visible at every step that masks less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

Schedule = Callable[[float], float]

EXPONENTIAL_RATE = 3.0


def linear(fraction: float) -> float:
    """Step k of N masks k/N."""
    return fraction


def cosine(fraction: float) -> float:
    """`sin(pi f / 2)`: MaskGIT's cosine schedule (Chang et al., 2022, section 3.2), read from the clean end."""
    return math.sin(math.pi * fraction / 2)


def exponential(fraction: float) -> float:
    """`(e^(r f) - 1) / (e^r - 1)` with r = 3: little noise for long, then a lot."""
    return math.expm1(EXPONENTIAL_RATE * fraction) / math.expm1(EXPONENTIAL_RATE)


def random(fraction: float, seed: int = 0) -> float:
    """`f^p` with `log2 p` uniform in [-1, 1] by `seed`: another monotone curve for every seed."""
    generator = torch.Generator().manual_seed(seed)
    power = 2.0 ** (2.0 * torch.rand((), generator=generator).item() - 1.0)
    return float(fraction**power)


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "exponential": exponential, "random": random}


def schedule(name: str, seed: int = 0) -> Schedule:
    """The schedule of that name; `seed` picks the curve of `random`. `ValueError` for other names."""
    if name not in SCHEDULES:
        raise ValueError(f"masking_strategy is {name!r}: want one of {', '.join(SCHEDULES)}")
    return (lambda fraction: random(fraction, seed)) if name == "random" else SCHEDULES[name]


def maskable_rows(tokens: Tensor, special_ids: Collection[int]) -> Tensor:
    """tokens `(L,)` -> bool `(L,)`: special tokens and padding are never masked."""
    return ~torch.isin(tokens, torch.tensor(sorted(special_ids), dtype=tokens.dtype, device=tokens.device))


def mask_ranks(maskable: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of masking, as ranks in [0, 1): bool `(L,)` -> float64 `(L,)`, infinite where not maskable."""
    rows = maskable.nonzero().squeeze(1)
    ranks = torch.full(maskable.shape, math.inf, dtype=torch.float64)
    order = torch.randperm(len(rows), generator=generator)
    ranks[rows.cpu()] = order.double() / len(rows)
    return ranks.to(maskable.device)


def masked_at(ranks: Tensor, ratio: float) -> Tensor:
    """Rows masked at a ratio in [0, 1]: ranks `(L,)` -> bool `(L,)`. Nested: a larger ratio masks a superset."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio is {ratio!r}: want 0 <= ratio <= 1")
    return ranks < ratio


def chain_masks(ranks: Tensor, n_steps: int, curve: Schedule = linear) -> Tensor:
    """The whole chain: ranks `(L,)` -> bool `(n_steps + 1, L)`, from step 0 (clean) to n_steps (all masked)."""
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}: want >= 1")
    return torch.stack([masked_at(ranks, curve(step / n_steps)) for step in range(n_steps + 1)])


def corrupt(
    tokens: Tensor,
    masked: Tensor,
    mask_token_id: int,
    *,
    vocab_size: int = 0,
    random_share: float = 0.0,
    keep_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Write `[MASK]` over the masked rows: `(L,)`, bool `(L,)` -> `(L,)`.

    With `random_share=0.1, keep_share=0.1` this is BERT's 80/10/10 (Devlin et al., 2019, section 3.1):
    of the masked rows, that share shows a random token of `vocab_size`, and that share its own. Raises `ValueError`.
    """
    if not (random_share >= 0 and keep_share >= 0 and random_share + keep_share <= 1):
        raise ValueError(f"random_share is {random_share}, keep_share is {keep_share}: want both >= 0, sum <= 1")
    if random_share > 0 and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: want the number of tokens, >= 1, with a random_share above 0")
    corrupted = torch.where(masked, mask_token_id, tokens)
    if random_share + keep_share == 0.0:
        return corrupted
    draw = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    others = torch.randint(max(vocab_size, 1), tokens.shape, generator=generator, dtype=tokens.dtype).to(tokens.device)
    corrupted = torch.where(masked & (draw < random_share), others, corrupted)
    return torch.where(draw >= 1.0 - keep_share, tokens, corrupted)
