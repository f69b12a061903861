"""The floating-point operations a model needs: the useful work, independent of how it is carried out.

The gate's own matrices are left out: below 1 % of what is counted for passes, up to 1.3 % with settling (rdt-small).
"""

from __future__ import annotations

from rdt_core.config import ModelConfig


def layer_flops(config: ModelConfig, length: int) -> int:
    """One encoder layer, per token: a multiply-add counts as two; norms and activations are left out."""
    projections = 4 * config.d_model**2 + 2 * config.d_model * config.d_ff
    attention = 2 * length * config.d_model
    return 2 * (projections + attention)


def pass_flops(config: ModelConfig, length: int) -> int:
    """One pass of the shared encoder, per token of a sequence of `length` tokens."""
    return config.n_encoder_layers * layer_flops(config, length) + 2 * config.d_model**2


def unread_flops(config: ModelConfig) -> int:
    """What is saved by a row that is not decoded, in the last pass of its sequence: its output of the last layer.

    Its keys and values are needed by other rows; its query and attention are computed along with theirs.
    """
    saved = config.d_model**2 + 2 * config.d_model * config.d_ff
    return 2 * saved if config.n_coda_layers == 0 else 0


def decode_flops(config: ModelConfig) -> int:
    """The vocabulary projection of one row, and what only that row needs before it."""
    return _projection_flops(config, config.vocab_size)


def shortlist_flops(config: ModelConfig) -> int:
    """The token level of one row: the part of its decoding that is done for the shortlist."""
    return _projection_flops(config, config.gate_shortlist) if config.gate_shortlist else 0


def _projection_flops(config: ModelConfig, n_tokens: int) -> int:
    """The projection of one row onto `n_tokens` tokens."""
    dense = config.d_model**2 if config.decoder_type == "dense" else 0
    return 2 * (config.d_model * n_tokens + dense)


def sequence_flops(config: ModelConfig, length: int, n_decoded: int, steps: int) -> int:
    """A whole restoration: prelude, `steps` passes, decoder layers, and `n_decoded` rows through the vocabulary.

    Every pass counts all rows; `unread_flops` is what the last one may save.
    """
    outer = config.n_prelude_layers + config.n_coda_layers
    encoder = length * (steps * pass_flops(config, length) + outer * layer_flops(config, length))
    return encoder + n_decoded * decode_flops(config)
