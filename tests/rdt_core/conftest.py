"""Fresh tiny models, and random sequences to run them on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rdt_core import RDT, ModelConfig

Build = Callable[..., RDT]


@pytest.fixture(scope="session")
def build(tiny_config: ModelConfig) -> Build:
    """`build(seed, **changes)`: a trainable tiny model with its own weights."""

    def build(seed: int = 0, **changes: object) -> RDT:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return RDT(tiny_config.with_changes(**changes))

    return build
