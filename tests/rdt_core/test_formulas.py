"""The model written out once more, one sequence at a time and with nothing clever: what the weights of a file mean.

L: tokens of the sequence   D: model width   H: heads   C: width of one head   G: features of the gate   V: vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rdt_core import RDT, ModelConfig
from tests.rdt_core.conftest import Build
from tests.rdt_core.sequences import random_sequences
from tests.rdt_core.test_model import perturb, variants

LENGTH = 7
N_PASSES = 3


class Plain:
    """A model of these weights: the formulas alone."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        self.weights, self.config = weights, config

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def norm(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        normal = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        inner = f"{name}.norm" if f"{name}.norm.weight" in self.weights else name  # of an `AdaptiveNorm`
        normal = normal * self.weights[f"{inner}.weight"] + self.weights[f"{inner}.bias"]
        if condition is None:
            return normal
        scale, shift = self.linear(f"{name}.modulation", condition).chunk(2)
        return normal * (1 + scale) + shift

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["embedding.weight"][tokens] * math.sqrt(self.config.d_model)  # (L, D)

    def attention(self, name: str, x: Tensor) -> Tensor:
        n_heads, head_width = self.config.n_heads, self.config.d_model // self.config.n_heads
        mixed = []
        query, key, value = (part.view(-1, n_heads, head_width) for part in self.linear(f"{name}.qkv", x).chunk(3, -1))
        for head in range(n_heads):
            q, k, v = (part[:, head] for part in (query, key, value))  # (L, C) each
            if self.config.positions == "rotary":
                q, k = self.turn(q), self.turn(k)
            mixed.append((q @ k.T / math.sqrt(head_width)).softmax(-1) @ v)
        return self.linear(f"{name}.out", torch.cat(mixed, -1))

    def turn(self, x: Tensor) -> Tensor:
        """Su et al., 2021: pair i of the row at place p is turned by p x 10000^(-2i/C)."""
        width, out = x.shape[1], torch.empty_like(x)
        for place in range(len(x)):
            for i in range(width // 2):
                angle = place * 10_000 ** (-2 * i / width)
                a, b = x[place, i], x[place, i + width // 2]
                out[place, i] = a * math.cos(angle) - b * math.sin(angle)
                out[place, i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def layers(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        n_layers = len({key.split(".")[1] for key in self.weights if key.startswith(f"{name}.")})
        for layer in (f"{name}.{index}" for index in range(n_layers)):
            for block, norm in ((self.attention, "attention"), (self.feed_forward, "feed_forward")):
                if self.config.norm == "pre":
                    x = x + block(f"{layer}.{norm}", self.norm(f"{layer}.{norm}_norm", x, condition))
                else:
                    x = self.norm(f"{layer}.{norm}_norm", x + block(f"{layer}.{norm}", x), condition)
        return x

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.down", gelu(self.linear(f"{name}.up", x)))

    def begin(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden and embedded, (L, D) each."""
        hidden = embedded = self.embed(tokens)
        if self.config.positions == "learned":
            hidden = embedded + self.weights["position_embedding.weight"][: len(tokens)]
        return self.layers("prelude", hidden), embedded

    def one_pass(self, hidden: Tensor, embedded: Tensor, level: Tensor) -> Tensor:
        condition = None
        if self.config.level_conditioning:
            raised = self.linear("level_embedding", level.view(1))
            condition = raised * torch.sigmoid(raised)  # (D,)
        return self.layers("encoder", self.norm("hidden_norm", hidden) + self.linear("inject", embedded), condition)

    def gate_features(self, hidden: Tensor) -> Tensor:
        return gelu(self.linear("gate.features", self.norm("gate.norm", hidden)))  # (L, G)

    def read(self, hidden: Tensor, masked: Tensor, level: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        """The level after a pass, and the mean features of the masked rows (G,)."""
        mean = self.gate_features(hidden)[masked].mean(0)
        seen = torch.cat((mean, mean - summary, level.view(1)))
        shrink = torch.sigmoid(self.linear("gate.sequence", gelu(self.linear("gate.mix", seen))))
        return level * shrink[0], mean

    def logits(self, hidden: Tensor) -> Tensor:
        """(L, V)"""
        features = self.layers("decoder", hidden)
        if self.config.decoder_type == "dense":
            features = gelu(self.linear("decoder_dense", features))
        out = self.norm("decoder_norm", features) @ self.weights["embedding.weight"].T + self.weights["decoder_bias"]
        out[:, list(self.config.suppress_tokens)] = -math.inf
        return out

    def token_level(self, hidden: Tensor) -> Tensor:
        """(L,)"""
        read = self.linear("gate.token", self.gate_features(hidden))
        if self.config.gate_shortlist == 0:
            return torch.sigmoid(read[:, 0])
        allowed = [token for token in range(self.config.vocab_size) if token not in self.config.suppress_tokens]
        allowed.sort(key=lambda token: -float(self.weights["decoder_bias"][token]))
        listed = self.logits(hidden)[:, allowed[: self.config.gate_shortlist]]
        others = read[:, 1] + math.log(len(allowed) - self.config.gate_shortlist)  # their log-sum-exp, as estimated
        best_other = others - torch.log1p(read[:, 0].exp())
        best = torch.maximum(listed.amax(1), best_other)
        return 1 - best.exp() / (listed.exp().sum(1) + others.exp())


def gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, 2016."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.fixture
def model(build: Build, changes: dict[str, object]) -> RDT:
    return perturb(build(**changes)).eval()


@variants
@torch.no_grad()
def test_passes_levels_and_logits_are_those_of_the_formulas(model: RDT) -> None:
    tokens, masked, packing = random_sequences([LENGTH])
    plain = Plain(model.state_dict(), model.config)
    state = model.begin(tokens, masked, packing)
    hidden, embedded = plain.begin(tokens)
    level, summary = torch.tensor(1.0), torch.zeros(model.config.gate_hidden_dim)
    for _ in range(N_PASSES):
        state = model(state, packing)
        hidden = plain.one_pass(hidden, embedded, level)
        level, summary = plain.read(hidden, masked, level, summary)
        torch.testing.assert_close(state.hidden, hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.gate.level, level.view(1))
    torch.testing.assert_close(model.decode(state.hidden, packing), plain.logits(hidden), atol=1e-4, rtol=1e-5)
    foretold = model.token_level(state.hidden, packing, torch.arange(LENGTH))
    torch.testing.assert_close(foretold, plain.token_level(hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_level_of_a_single_gap_is_that_of_the_formulas(build: Build) -> None:
    model = perturb(build()).eval()
    tokens, _, packing = random_sequences([LENGTH])
    masked = torch.arange(LENGTH) == 3
    found = model(model.begin(tokens, masked, packing), packing)
    level, summary = torch.tensor(1.0), torch.zeros(model.config.gate_hidden_dim)
    level, summary = Plain(model.state_dict(), model.config).read(found.hidden, masked, level, summary)
    torch.testing.assert_close(found.gate.level, level.view(1))
    torch.testing.assert_close(found.gate.summary, summary[None])


@torch.no_grad()
def test_the_gate_computes_in_float32_where_the_rest_of_a_pass_does_not(build: Build) -> None:
    model = perturb(build()).eval()
    tokens, masked, packing = random_sequences([LENGTH])
    state = model(model.begin(tokens, masked, packing), packing)

    def read() -> tuple[Tensor, ...]:
        token_level = model.token_level(state.hidden, packing, torch.arange(LENGTH))
        of_the_state_alone = model.gate.token_level(state.hidden, None)
        return (*model.gate(state.hidden, masked, packing, state.gate), token_level, of_the_state_alone)

    exact = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, read(), exact))


@variants
@torch.no_grad()
def test_a_settled_token_is_embedded_in_the_place_of_its_mask(model: RDT) -> None:
    tokens, masked, packing = random_sequences([LENGTH])
    plain = Plain(model.state_dict(), model.config)
    row = int(masked.nonzero()[0])
    state = model.settle(model.begin(tokens, masked, packing), torch.tensor([row]), torch.tensor([9]))
    assert state.masked.tolist() == [bool(was) and index != row for index, was in enumerate(masked)]
    embedded = plain.embed(tokens)
    embedded[row] = plain.embed(torch.tensor([9]))[0]
    torch.testing.assert_close(state.embedded, embedded)
