"""The left-to-right model, written out once more in plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.evaluation import causal
from training.evaluation.causal import CausalConfig, CausalLM

CONFIG = CausalConfig(vocab_size=40, d_model=16, n_heads=2, n_layers=2, d_ff=24)


def normalised(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions (Su et al., 2021, eq. 34) of one head `(C,)`; a pair is a channel and the one half a head on."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-torch.arange(half) / half)
    one, other = x[:half], x[half:]
    return torch.cat((one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()))


def attended(layer: Any, x: Tensor) -> Tensor:
    """x `(L, D)` -> `(L, D)`."""
    width = x.shape[1] // layer.n_heads
    q, k, v = layer.qkv(normalised(x, layer.attention_norm)).chunk(3, dim=-1)
    mixed = torch.zeros_like(x)
    for head in range(layer.n_heads):
        part = slice(head * width, (head + 1) * width)
        for at in range(len(x)):
            query = turned(q[at, part], at)
            scores = torch.stack([query @ turned(k[seen, part], seen) for seen in range(at + 1)]) / math.sqrt(width)
            mixed[at, part] = scores.softmax(0) @ v[: at + 1, part]
    return layer.out(mixed)  # type: ignore[no-any-return]


def logits_of(model: CausalLM, tokens: Tensor) -> Tensor:
    x = model.embedding.weight[tokens] * 4.0
    for layer in model.layers:
        x = x + attended(layer, x)
        up, down = (module for module in layer.feed_forward.children() if isinstance(module, torch.nn.Linear))
        x = x + down(torch.nn.functional.gelu(up(normalised(x, layer.feed_forward_norm))))
    return normalised(x, model.norm) @ model.embedding.weight.T + model.bias


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
