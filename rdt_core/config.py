"""The shape of a model, checked on construction.

`ModelConfig` travels inside every checkpoint, so a checkpoint alone says how to build its model and
which request defaults (`halting`, `max_steps`, `threshold`) its weights were evaluated with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Halting = Literal["gate", "settle"]
DecoderType = Literal["linear", "dense", "transformer"]
Norm = Literal["pre", "post"]
Positions = Literal["rotary", "learned"]

HALTINGS: tuple[Halting, ...] = get_args(Halting)
REQUEST_DEFAULTS = ("halting", "max_steps", "threshold")
"""The settings of a model that a request may set, too: they shape answers, not weights."""

MAX_LAYERS, MAX_SIZE = 1000, 2**31 - 1
"""Larger values come from damaged files, and would keep a server busy for nothing."""

DECODER_TYPES: tuple[str, ...] = get_args(DecoderType)
NORMS: tuple[str, ...] = get_args(Norm)
POSITIONS: tuple[str, ...] = get_args(Positions)
CHOICES = {"decoder_type": DECODER_TYPES, "norm": NORMS, "positions": POSITIONS, "halting": HALTINGS}


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build an `RDT`, and the defaults its answers are given with.

    Raises `ValueError` naming the field, the value and the range.
    """

    vocab_size: int = 30_522
    d_model: int = 512
    n_heads: int = 8
    n_encoder_layers: int = 6
    n_decoder_layers: int = 0
    d_ff: int = 2048
    dropout: float = 0.1
    max_seq_len: int = 512
    decoder_type: DecoderType = "linear"
    """What comes before the vocabulary. `linear`: a norm; `dense`: BERT's dense layer, GELU and a norm; `transformer`:
    `n_decoder_layers` layers and a norm."""
    norm: Norm = "pre"
    """`pre`: each residual branch reads what was normed; `post`, as in BERT: the sum after each branch is normed."""
    positions: Positions = "rotary"
    """`learned`: a table of `max_seq_len` rows, added once, before the first pass."""
    gate_hidden_dim: int = 256
    gate_shortlist: int = 0
    """How many of the likeliest tokens a token level reads the logits of; 0: it reads the hidden state alone."""
    n_prelude_layers: int = 0
    level_conditioning: bool = False
    total_steps: int = 20
    """The unit of the level: a level of 1 stands for this many passes left."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never an answer: padding, unknown, start, end, mask."""
    halting: Halting = "gate"
    max_steps: int = 20
    threshold: float = 0.05

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads", "d_ff", "gate_hidden_dim", "total_steps", "max_steps"):
            self._check_int(name, minimum=1)
        self._check_int("max_seq_len", minimum=3)  # [CLS], something, [SEP]
        for name, minimum in (("n_encoder_layers", 1), ("n_decoder_layers", 0), ("n_prelude_layers", 0)):
            self._check_int(name, minimum, MAX_LAYERS)
        self._check_suppressed()
        object.__setattr__(self, "suppress_tokens", tuple(dict.fromkeys(self.suppress_tokens)))  # each once
        self._check_int("gate_shortlist", 0, self.vocab_size - len(self.suppress_tokens))
        for name in ("dropout", "threshold"):
            self._check_number(name)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}: want 0 <= dropout < 1")
        if not 0.0 <= self.threshold <= sys.float_info.max:  # a whole number may be larger
            raise ValueError(f"threshold is {self.threshold!r}: want a finite number >= 0")
        if not isinstance(self.level_conditioning, bool):
            raise ValueError(f"level_conditioning is {self.level_conditioning!r}: want true or false")
        self._check_choices()
        unit, why = (2 * self.n_heads, "2 x n_heads") if self.positions == "rotary" else (self.n_heads, "n_heads")
        if self.d_model % unit != 0:
            raise ValueError(f"d_model is {self.d_model}: want a multiple of {why} = {unit}")
        if self.decoder_type == "transformer" and self.n_decoder_layers == 0:
            raise ValueError("n_decoder_layers is 0: want >= 1 with decoder_type 'transformer'")
        if self.decoder_type == "transformer" and self.gate_shortlist > 0:
            raise ValueError(
                f"gate_shortlist is {self.gate_shortlist}: want 0 with decoder_type 'transformer', whose layers every "
                "pass would have to run for it"
            )

    @property
    def n_coda_layers(self) -> int:
        """Decoder layers that the model has: `n_decoder_layers` counts only with decoder_type 'transformer'."""
        return self.n_decoder_layers if self.decoder_type == "transformer" else 0

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: want one of {', '.join(allowed)}")

    def _check_suppressed(self) -> None:
        tokens: object = self.suppress_tokens  # whatever a file says
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise ValueError(f"suppress_tokens is {tokens!r}: want a list of tokens")
        outside = [token for token in tokens if type(token) is not int or not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"suppress_tokens has {outside[0]!r}: want 0 <= token < vocab_size = {self.vocab_size}")
        if len(set(tokens)) == self.vocab_size:
            raise ValueError("suppress_tokens has the whole vocabulary: want at least one token left to answer")

    def _check_int(self, name: str, minimum: int, maximum: int = MAX_SIZE) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not minimum <= value <= maximum:
            bounded = maximum < MAX_SIZE or (whole and value > maximum)
            wanted = f"from {minimum} to {maximum}" if bounded else f">= {minimum}"
            raise ValueError(f"{name} is {value!r}: want a whole number {wanted}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}: want a number")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from plain values, refusing names that are not fields (`ValueError`)."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"{unknown[0]} is not a model setting; known: {', '.join(sorted(known))}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def with_changes(self, **changes: Any) -> ModelConfig:
        """A copy with other values. Raises `ValueError`, as `from_mapping` does."""
        return self.from_mapping({**vars(self), **changes})


PRESETS: dict[str, ModelConfig] = {
    "small": ModelConfig(d_model=256, n_heads=4, n_encoder_layers=4, d_ff=1024),
    "base": ModelConfig(d_model=512, n_heads=8, n_encoder_layers=6, d_ff=2048),
    "large": ModelConfig(d_model=768, n_heads=12, n_encoder_layers=12, d_ff=3072),
}
"""Shapes by size, which random weights are made in. The bundled `rdt-small` has a shape of its own."""
