"""A left-to-right model that says how likely a text is; it knows nothing of masks.

N: texts   L: tokens of one   D: width   H: heads   C: width of one head   V: vocabulary

Pre-norm layers with rotary positions as in `rdt_core.layers`, causal attention, and a tied embedding. It reads
`[CLS]` first, so that every token of the text has a left context.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core import checkpoint
from rdt_core.checkpoint import Checkpoint, CheckpointError
from rdt_core.layers import FeedForward, products_attention, rotary_angles, rotate, slow_backward
from rdt_core.tokenizer import Tokenizer
from training.config import one_line
from training.mixed_precision import autocast

TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class CausalConfig:
    vocab_size: int
    d_model: int = 256
    n_heads: int = 4
    n_layers: int = 4
    d_ff: int = 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{name} is {value!r}: want a whole number >= 1")
        if self.d_model % (2 * self.n_heads) != 0:
            raise ValueError(f"d_model is {self.d_model}: want a multiple of 2 x n_heads = {2 * self.n_heads}")


class CausalLayer(nn.Module):
    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1)).unbind(2)  # (N, L, H, C) each
        q, k, v = (heads.transpose(1, 2) for heads in (rotate(q, *rotary), rotate(k, *rotary), v))  # (N, H, L, C)
        attend = products_attention if slow_backward(q) else F.scaled_dot_product_attention
        mixed = attend(q, k, v, is_causal=True).transpose(1, 2)  # (N, L, H, C)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.feed_forward(self.feed_forward_norm(x))


class CausalLM(nn.Module):
    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `(N, L)` -> logits `(N, L, V)` of the token that follows each."""
        return F.linear(self.features(tokens), self.embedding.weight, self.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """tokens `(N, L)` -> what is projected onto the vocabulary, `(N, L, D)`."""
        x = self.embedding(tokens) * math.sqrt(self.config.d_model)  # (N, L, D)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rotary = rotary_angles(positions, self.config.d_model // self.config.n_heads)  # (L, 1, C/2)
        for layer in self.layers:
            x = layer(x, rotary)
        normed: Tensor = self.norm(x)
        return normed

    def nats(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood `(N, L - 1)` of every token `(N, L)` after the first, given those before it."""
        logits = self(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return nats.view(len(tokens), -1)


@dataclass(frozen=True)
class Scorer:
    """A trained left-to-right model, and what it learned from."""

    model: CausalLM
    tokenizer: Tokenizer
    name: str
    digest: str
    text: str
    bfloat16: bool = False  # of its products, where they are native

    @torch.no_grad()
    def bits(self, texts: Tensor) -> Tensor:
        """Surprise in bits at each token of texts, both `(S, L)`; 0 at their ends, `[CLS]` and `[SEP]`."""
        device = self.model.embedding.weight.device
        with autocast(device, self.bfloat16):
            nats = torch.cat([self.model.nats(some.to(device)).double().cpu() for some in texts.split(TEXTS_AT_ONCE)])
        bits = F.pad(nats / math.log(2), (1, 0))  # (S, L)
        bits[:, -1] = 0.0
        return bits


def save_scorer(path: Path, model: CausalLM, tokenizer: Tokenizer, name: str, training: dict[str, Any]) -> None:
    """A file of tensors and plain values, in the form of any checkpoint, with `config["scorer"]` for the shape."""
    config = {"name": name, "scorer": asdict(model.config), "training": training}
    weights = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    checkpoint.save(path, Checkpoint(weights, config, tokenizer.json, step=int(training["steps"])))


def load_scorer(path: Path, device: torch.device | str = "cpu", bfloat16: bool = False) -> Scorer:
    """Raises `CheckpointError` for a file that holds no scorer."""
    saved = checkpoint.read(path)
    tokenizer = checkpoint.tokenizer_of(path, saved)
    shape = saved.config.get("scorer") if isinstance(saved.config, dict) else None
    if not isinstance(shape, dict):
        raise CheckpointError(path, "config has no 'scorer' section: want a file of python -m training.scorer")
    try:
        with torch.device("meta"):
            model = CausalLM(CausalConfig(**shape))
        model.load_state_dict(saved.model_state_dict, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, one_line(error)) from error
    training = saved.config.get("training")
    text = str(training.get("text", "")) if isinstance(training, dict) else ""
    name = str(saved.config.get("name", path.stem))
    model = model.to(device).eval().requires_grad_(False)
    return Scorer(model, tokenizer, name, checkpoint.digest(path), text, bfloat16)
