"""RDT: one shared encoder, applied again and again.

T: packed tokens   N: sequences   D: model width   V: vocabulary   M: rows asked for

    begin    tokens (T,)  -> State          prelude: embed, optional layers of its own
    forward  State        -> State          one pass of the shared encoder, then the gate
    decode   State, rows  -> logits (M, V)  coda: only the rows that were asked for
    settle   State, rows  -> State          decoded tokens replace [MASK] in the embedded input

`token_level` says which rows are sure enough to settle, without decoding any.

Every pass starts from `LayerNorm(hidden) + W_inject . embedded`: the input is fed back in at every
pass and the hidden state cannot grow, which keeps the recursion stable at any depth (compare the
input injection of Deep Equilibrium Models, Bai et al., 2019, and of Geiping et al., 2025).
Level and gate state are per sequence, so sequences of different depths share one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core.config import ModelConfig
from rdt_core.gate import Gate, GateState
from rdt_core.layers import AdaptiveNorm, Condition, EncoderLayer, Rotary, rotary_angles
from rdt_core.packing import Packing
from rdt_core.rows import RowCounts, same_sums

if TYPE_CHECKING:
    from rdt_core.inference import Restoration


POSITION_STD = 0.1  # of a fresh position table; embedded tokens have a standard deviation of 1


class State(NamedTuple):
    """All that `N` live sequences carry from pass to pass."""

    hidden: Tensor  # (T, D)
    embedded: Tensor  # (T, D) the embedded input, fed back in at every pass
    masked: Tensor  # (T,) bool, rows still to be restored
    gate: GateState


class RDT(nn.Module):
    """Recursive Denoising Transformer.

    Takes a `ModelConfig`, or its fields by name: `RDT(d_model=256, n_heads=4, ...)`.
    """

    def __init__(self, config: ModelConfig | None = None, /, **fields: Any) -> None:
        super().__init__()
        if config is not None and fields:
            raise TypeError("give RDT a ModelConfig or its fields, not both")
        self.config = config = config or ModelConfig.from_mapping(fields)
        layer = partial(
            EncoderLayer, config.d_model, config.n_heads, config.d_ff, config.dropout, post=config.norm == "post"
        )
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_dropout = nn.Dropout(config.dropout)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        self.prelude = nn.ModuleList(layer() for _ in range(config.n_prelude_layers))
        self.hidden_norm = nn.LayerNorm(config.d_model)
        self.inject = nn.Linear(config.d_model, config.d_model, bias=False)
        self.level_embedding = nn.Linear(1, config.d_model) if config.level_conditioning else None
        self.encoder = nn.ModuleList(
            layer(conditioned=config.level_conditioning) for _ in range(config.n_encoder_layers)
        )
        self.decoder = nn.ModuleList(layer() for _ in range(config.n_coda_layers))
        self.decoder_dense = nn.Linear(config.d_model, config.d_model) if config.decoder_type == "dense" else None
        self.decoder_norm = nn.LayerNorm(config.d_model)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.projection: nn.Module | None = None  # onto the vocabulary; None: the tied embedding
        self.precision = "fp32"  # of the matrix products, see `rdt_core.precision`
        self.row_counts = RowCounts()
        self.rotary: Callable[[Tensor, int], Rotary] = rotary_angles
        n_others = config.vocab_size - len(config.suppress_tokens) - config.gate_shortlist
        self.gate = Gate(config.d_model, config.gate_hidden_dim, n_others if config.gate_shortlist else None)
        self.fixed_shortlist: tuple[Tensor, Tensor] | None = None  # kept once weights no longer change
        if not self.embedding.weight.is_meta:  # on `meta` there are no values to initialise
            self._initialise()
        self.n_parameters = sum(parameter.numel() for parameter in self.parameters())

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=POSITION_STD)
        nn.init.eye_(self.inject.weight)
        for module in self.modules():
            if isinstance(module, EncoderLayer):  # residual branches start small
                module.attention.out.weight.data.mul_(0.5)
                module.feed_forward.down.weight.data.mul_(0.5)
            elif isinstance(module, AdaptiveNorm):
                module.reset_modulation()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens `(M,)` -> embedded input `(M, D)`, of unit variance at initialisation."""
        scaled: Tensor = self.embedding(tokens) * math.sqrt(self.config.d_model)
        return self.embedding_dropout(scaled)

    def begin(self, tokens: Tensor, masked: Tensor, packing: Packing) -> State:
        """The prelude. tokens `(T,)`, masked `(T,)` bool -> the state before the first pass.

        Raises `ValueError` for a sequence that is longer than a table of positions.
        """
        hidden = embedded = self.embed(tokens)  # (T, D)
        if self.position_embedding is not None:
            if packing.longest > self.config.max_seq_len:
                raise ValueError(f"a sequence has {packing.longest} tokens: want 1 to {self.config.max_seq_len}")
            hidden = embedded + self.position_embedding(packing.positions)
        hidden = self._layers(self.prelude, hidden, packing)
        return State(hidden, embedded, masked, self.gate.start(packing))

    def forward(self, state: State, packing: Packing, rows: Tensor | None = None) -> State:
        """One pass of the shared encoder over every live sequence, then the gate's reading.

        `rows` `(R,)` says which rows of the new hidden state will be read: all rows of sequences that go on, and the
        masked rows of those that stop. The last layer computes only these, and the rest of `hidden` is zeros; None:
        all rows. Coda layers read every row, so with them `rows` has no effect.
        """
        if len(self.decoder) > 0:
            rows = None
        x = self.hidden_norm(state.hidden) + self.inject(state.embedded)  # (T, D)
        condition = None
        if self.level_embedding is not None:
            levels = self.level_embedding(state.gate.level.detach()[:, None].to(x.dtype))  # (N, D)
            values = F.silu(levels.double()).to(levels.dtype)  # the same digits in any company: see `few_outputs`
            condition = Condition(values, packing.sequence_ids)
        hidden = self._layers(self.encoder, x, packing, condition, rows)
        if rows is not None:
            hidden = hidden.new_zeros(x.shape).index_copy(0, rows, hidden)
        return state._replace(hidden=hidden, gate=self.gate(hidden, state.masked, packing, state.gate))

    def decode(self, hidden: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """The coda. hidden `(T, D)`, rows `(M,)` or all -> logits `(M, V)` against the tied embedding."""
        features = self.features(hidden, packing, rows)
        if self.projection is not None:
            return self.projection(features)
        return F.linear(features, self.embedding.weight, self.output_bias)

    def features(self, hidden: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """The coda up to the vocabulary: hidden `(T, D)`, rows `(M,)` or all -> what is projected, `(M, D)`."""
        hidden = self._layers(self.decoder, hidden, packing)
        if rows is not None:
            hidden = hidden[rows]
        if self.decoder_dense is not None:
            hidden = F.gelu(self.decoder_dense(hidden))
        normed: Tensor = self.decoder_norm(hidden)
        return normed

    def token_level(self, hidden: Tensor, packing: Packing, rows: Tensor) -> Tensor:
        """hidden `(T, D)`, rows `(M,)` -> the gate's prediction of how likely each row's best guess is wrong `(M,)`.

        Float32 whatever the model's precision. Only the gate's own weights get a gradient.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.detach().float()
            shortlisted = None
            if self.config.gate_shortlist > 0:
                with torch.no_grad():
                    weight, bias = self.shortlist
                    features = self.features(hidden, packing, rows)
                    shortlisted = same_sums(lambda some: F.linear(some, weight, bias), features)  # (M, K)
            return self.gate.token_level(hidden[rows], shortlisted)

    @property
    def shortlist(self) -> tuple[Tensor, Tensor]:
        """Embeddings `(K, D)` and biases `(K,)` of the tokens with the largest output bias, the most frequent ones."""
        if self.fixed_shortlist is not None:
            return self.fixed_shortlist
        bias = self.output_bias.detach()
        tokens = bias.argsort(descending=True, stable=True)[: self.config.gate_shortlist]
        return self.embedding.weight.detach()[tokens], bias[tokens]

    @property
    def output_bias(self) -> Tensor:
        """The bias of every token `(V,)`: minus infinity for those that are never an answer."""
        suppressed = torch.tensor(self.config.suppress_tokens, dtype=torch.int64, device=self.device)
        return self.decoder_bias.index_fill(0, suppressed, -math.inf)

    def settle(self, state: State, rows: Tensor, tokens: Tensor) -> State:
        """Rows `(M,)` are restored as `tokens` `(M,)`: the next pass sees them instead of `[MASK]`."""
        embedded = state.embedded.index_copy(0, rows, self.embed(tokens).to(state.embedded.dtype))
        return state._replace(embedded=embedded, masked=state.masked.index_fill(0, rows, False))

    def recursive_forward(
        self,
        tokens: Tensor,
        masked: Tensor,
        packing: Packing,
        n_passes: int,
        n_grad_passes: int = 2,
        *,
        rows: Tensor | None = None,
    ) -> list[State]:
        """Several passes, for training: the states after each, gradients through the last few only.

        tokens `(T,)`, masked `(T,)` bool -> `n_passes` states; decode those the loss looks at. The
        embedded input keeps its gradient in every pass that has one. `rows` are those of the last pass, see `forward`.
        """
        if n_passes < 1 or n_grad_passes < 1:
            raise ValueError(f"n_passes is {n_passes}, n_grad_passes is {n_grad_passes}: want both >= 1")
        state = self.begin(tokens, masked, packing)
        states = []
        for step in range(n_passes):
            if step == n_passes - n_grad_passes:
                torch.clear_autocast_cache()  # in torch 2.10 it keeps weights that were cast without gradients
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= n_passes - n_grad_passes):
                state = self(state, packing, rows if step == n_passes - 1 else None)
            states.append(state)
        return states

    def inference(self, tokens: Tensor, masked: Tensor, **options: Any) -> Restoration:
        """Restore one sequence; options as in `rdt_core.inference.restore`."""
        from rdt_core.inference import restore  # noqa: PLC0415 - the reference is written in terms of this class

        return restore(self, tokens, masked, **options)

    def _layers(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        packing: Packing,
        condition: Condition | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`(T, D)` -> `(T, D)`, or with `rows` `(R,)`, only these out of the last layer: `(R, D)`."""
        if len(layers) == 0:
            return x
        n_rows = packing.n_tokens if rows is None else len(rows)
        rotary = None
        if self.position_embedding is None:
            positions = self.row_counts.filled(packing.positions)
            rotary = self.rotary(positions, self.config.d_model // self.config.n_heads)
        x = self.row_counts.filled(x)
        if condition is not None:
            condition = condition._replace(sequence_ids=self.row_counts.filled(condition.sequence_ids))
        if rows is not None:
            rows = self.row_counts.filled(rows)  # dead rows are copies of the first
        *others, last = layers
        for layer in others:
            x = layer(x, packing, rotary, condition)
        return last(x, packing, rotary, condition, rows)[:n_rows]
