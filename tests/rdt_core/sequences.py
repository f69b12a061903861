"""Random packed input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdt_core import Packing


def random_sequences(lengths: Sequence[int], seed: int = 0, vocab_size: int = 50) -> tuple[Tensor, Tensor, Packing]:
    """Tokens `(T,)`, masked `(T,)` with the first row of every sequence among them, and their layout."""
    generator = torch.Generator().manual_seed(seed)
    packing = Packing.of(lengths)
    tokens = torch.randint(5, vocab_size, (packing.n_tokens,), generator=generator)
    masked = (torch.rand(packing.n_tokens, generator=generator) < 0.4) | (packing.positions == 0)
    return tokens, masked, packing
