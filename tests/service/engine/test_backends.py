"""Which backend suits a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdt_core import RDT, ModelConfig
from rdt_core.layers import has_varlen_attention
from service.engine import backends
from service.engine.eager import EagerBackend


@pytest.mark.parametrize(
    ("device", "capability", "precision", "captures"),
    [
        ("cuda:0", (9, 0), "bf16", True),
        ("cuda:0", (9, 0), "fp16", True),
        ("cuda:0", (9, 0), "fp32", False),
        ("cuda:0", (7, 5), "fp16", False),
        ("cpu", None, "bf16", False),
    ],
)
def test_passes_are_captured_where_attention_needs_no_host(
    device: str, capability: Any, precision: str, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(vocab_size=30, d_model=16, n_heads=2)
    model: Any = SimpleNamespace(device=torch.device(device), precision=precision, config=config)
    made: list[Any] = []
    monkeypatch.setattr(backends, "CapturedPasses", lambda of: ("captured", of))
    monkeypatch.setattr(backends, "LookaheadBackend", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    has_varlen_attention.cache_clear()
    try:
        backend = backends.make_backend(model, 512, 65_534)
    finally:
        has_varlen_attention.cache_clear()
    assert made == ([(model, 512, 65_534, ("captured", model))] if captures else [])
    assert isinstance(backend, EagerBackend) != captures


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_more_sequences_than_a_grid_has_rows_are_refused_beforehand(precision: str) -> None:
    """Else it would be the launch of some later tick that fails."""
    model: Any = SimpleNamespace(device=torch.device("cuda:0"), precision=precision)
    with pytest.raises(ValueError, match="max_live is 65535: want at most 65534 on CUDA"):
        backends.make_backend(model, 10**6, 65_535)


def test_a_model_on_a_cpu_runs_eagerly(tiny_config: ModelConfig) -> None:
    assert isinstance(backends.make_backend(RDT(tiny_config), 512, 100_000), EagerBackend)
