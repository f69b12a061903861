"""The layers of the encoder, over packed sequences.

T: packed tokens   N: sequences   L: tokens of one sequence   D: model width
H: heads           C: width of one head (D / H)

Pre-norm transformer layers (Xiong et al., 2020) with rotary positions (Su et al., 2021), or post-norm layers without
rotary positions, as in BERT (Devlin et al., 2019). There is no padding, so there is no mask: a token attends to every
token of its own sequence and to no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core.packing import Packing
from rdt_core.rows import same_sums

ROTARY_BASE = 10_000.0
Rotary = tuple[Tensor, ...]  # of `rotary_angles` or of `rotary_turns`


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(T, 1, C/2)` of every position `(T,)`, in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None].float() * ROTARY_BASE**-exponents  # (T, C/2)
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs `(x_i, x_{i + C/2})` of `(T, H, C)` by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def rotary_turns(positions: Tensor, head_dim: int) -> tuple[Tensor]:
    """`rotary_angles` as complex numbers `(T, 1, C/2)`."""
    return (torch.complex(*rotary_angles(positions, head_dim)),)


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """As `rotate`, where neighbours `(x_{2i}, x_{2i+1})` are the pairs: one complex product, far cheaper on a CPU."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (T, H, C/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Attention inside each sequence: three `(T, H, C)` -> `(T, H, C)`.

    Rows after those of the last sequence are dead: they come out as their query, and nobody reads them.

    On CUDA in half precision the variable-length kernel, where there is one, takes any lengths in one call. A single
    sequence takes it too, so that it gets the same digits as among others. Elsewhere equal lengths take one batched
    call. Unequal ones are padded on CUDA, where calls are slow, and take a call each on a CPU, which costs nothing
    measurable.
    """
    if len(query) > packing.n_tokens:
        live, dead = slice(packing.n_tokens), slice(packing.n_tokens, None)
        return torch.cat((packed_attention(query[live], key[live], value[live], packing), query[dead]))
    if has_varlen_attention(query.device, query.dtype, query.shape[-1]):
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - needs CUDA's kernels

        longest = packing.longest
        out = varlen_attn(query, key, value, packing.offsets, packing.offsets, longest, longest)
        assert isinstance(out, Tensor)
        return out
    if packing.equal_lengths:
        shape = (packing.n_sequences, packing.lengths[0], *query.shape[1:])
        q, k, v = (x.view(shape).transpose(1, 2) for x in (query, key, value))  # (N, H, L, C)
        mixed = products_attention if slow_backward(query) else F.scaled_dot_product_attention
        return mixed(q, k, v).transpose(1, 2).reshape(query.shape)
    if query.device.type == "cuda":
        return padded_attention(query, key, value, packing)
    heads_first = (x.transpose(0, 1)[None].split(packing.lengths, dim=2) for x in (query, key, value))
    apart = [F.scaled_dot_product_attention(q, k, v) for q, k, v in zip(*heads_first, strict=True)]  # (1, H, L, C) each
    return torch.cat(apart, dim=2)[0].transpose(0, 1)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """`packed_attention` in one call: every sequence is padded to the longest, and nobody attends to padding."""
    longest = max(packing.lengths)  # not `packing.longest`, which in a bucket leaves out its dead rows
    cells = packing.sequence_ids * longest + packing.positions  # (T,) of N x L
    nothing = query.new_zeros(packing.n_sequences * longest, *query.shape[1:])  # (N x L, H, C)
    padded = (nothing.index_copy(0, cells, x).unflatten(0, (-1, longest)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in padded)  # (N, H, L, C)
    is_token = torch.arange(longest, device=query.device) < packing.offsets.diff().unsqueeze(1)  # (N, L)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token.view(-1, 1, 1, longest))
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cells)


@cache
def has_varlen_attention(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether `torch.nn.attention.varlen` computes this: half precision, from Ampere on (8.0), heads of 8 n <= 256, and
    a torch that was built for CUDA with flash attention.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return head_width % 8 == 0 and head_width <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def products_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """Attention by plain matrix products, three `(N, H, L, C)` -> `(N, H, L, C)`; holds all `L x L` weights."""
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (N x H, L, C)
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))  # (N x H, L, L)
    if is_causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return torch.bmm(scores.softmax(-1), v).view(query.shape)


def slow_backward(query: Tensor) -> bool:
    """In bfloat16 on CPUs the fused kernel's backward takes 2 to 8 times as long as products; not so in float32."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad


class Condition(NamedTuple):
    """What modulates the norms: a vector for each sequence."""

    values: Tensor  # (N, D)
    sequence_ids: Tensor  # (T,) the sequence of each row

    def of(self, rows: Tensor) -> Condition:
        """For these rows `(R,)` alone."""
        return self._replace(sequence_ids=self.sequence_ids.index_select(0, rows))


class AdaptiveNorm(nn.Module):
    """Layer norm, optionally scaled and shifted by a condition per sequence (Peebles & Xie, 2023, adaLN-Zero).

    The projection starts at zero, so a fresh `AdaptiveNorm` is a plain layer norm.
    """

    def __init__(self, d_model: int, conditioned: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.modulation = nn.Linear(d_model, 2 * d_model) if conditioned else None

    def reset_modulation(self) -> None:
        """Back to a plain layer norm; called after every other initialisation has run."""
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        x = self.norm(x)  # (T, D)
        if self.modulation is None or condition is None:
            return x
        modulation = same_sums(self.modulation, condition.values)  # (N, 2 D)
        scale, shift = modulation.index_select(0, condition.sequence_ids).chunk(2, dim=-1)  # (T, D) each
        return x * (1 + scale) + shift


class SelfAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.rotate: Callable[..., Tensor] = rotate  # takes the tensors of a `Rotary`
        self.attend = packed_attention
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, packing: Packing, rotary: Rotary | None, rows: Tensor | None = None) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], 3 * self.n_heads, -1)  # (T, 3 H, C)
        qk, v = heads.tensor_split([2 * self.n_heads], dim=1)
        if rotary is not None:
            qk = self.rotate(qk, *rotary)
        q, k = qk.chunk(2, dim=1)  # (T, H, C) each
        mixed = self.attend(q, k, v, packing).reshape(x.shape)
        return self.out(mixed if rows is None else mixed.index_select(0, rows))


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.activation = nn.GELU()
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class EncoderLayer(nn.Module):
    """One transformer layer, of pre-norms unless `post`; a `condition` modulates both norms if given.

    With `rows` `(R,)`, only these come out, `(R, D)`. They attend to all rows; the outputs of the others are never
    computed.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_ff: int, dropout: float, *, post: bool = False, conditioned: bool = False
    ) -> None:
        super().__init__()
        self.post = post
        self.attention_norm = AdaptiveNorm(d_model, conditioned)
        self.attention = SelfAttention(d_model, n_heads)
        self.feed_forward_norm = AdaptiveNorm(d_model, conditioned)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        rotary: Rotary | None,
        condition: Condition | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`(T, D)` -> `(T, D)`, or `(R, D)`."""
        normed = x if self.post else self.attention_norm(x, condition)
        attended = self.dropout(self.attention(normed, packing, rotary, rows))
        if rows is not None:
            x = x.index_select(0, rows)
            condition = None if condition is None else condition.of(rows)
        if self.post:
            x = self.attention_norm(x + attended, condition)
            return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)), condition)
        x = x + attended
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x, condition)))
