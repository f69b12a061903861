"""The left-to-right model, written out once more in plain formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rdt_core import ModelConfig
from tests.rdt_core.test_formulas import Plain
from training.evaluation import causal
from training.evaluation.causal import CausalConfig, CausalLM

CONFIG = CausalConfig(vocab_size=40, d_model=16, n_heads=2, n_layers=2, d_ff=24)


def logits_of(model: CausalLM, tokens: Tensor) -> Tensor:
    """tokens `(L,)` -> `(L, V)`: a layer is the project's own, but a token attends to what is left of it alone."""
    plain = Plain(model.state_dict(), ModelConfig(vocab_size=CONFIG.vocab_size, d_model=CONFIG.d_model, n_heads=2))
    x = plain.embed(tokens)
    for layer in (f"layers.{index}" for index in range(CONFIG.n_layers)):
        normed = plain.norm(f"{layer}.attention_norm", x)
        x = x + torch.stack([plain.attention(layer, normed[: at + 1])[at] for at in range(len(x))])
        x = x + plain.feed_forward(f"{layer}.feed_forward", plain.norm(f"{layer}.feed_forward_norm", x))
    return plain.norm("norm", x) @ plain.weights["embedding.weight"].T + plain.weights["bias"]


@pytest.mark.parametrize("slow", [False, True])
@torch.no_grad()
def test_logits_and_surprise(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "slow_backward", lambda _: slow)
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.randint(CONFIG.vocab_size, (2, 7))
    expected = torch.stack([logits_of(model, text) for text in tokens])
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    surprise = [[-row.log_softmax(-1)[n] for row, n in zip(of, text[1:], strict=False)] for of, text in
                zip(expected, tokens, strict=True)]  # fmt: skip
    torch.testing.assert_close(model.nats(tokens), torch.tensor(surprise), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0: want a whole number >= 1"),
        ({"d_ff": 2.0}, r"d_ff is 2\.0: want a whole number >= 1"),
        ({"n_heads": True}, "n_heads is True: want a whole number >= 1"),
        ({"d_model": 18}, "d_model is 18: want a multiple of 2 x n_heads = 4"),
    ],
)
def test_a_shape_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
