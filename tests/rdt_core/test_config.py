from __future__ import annotations

import math
from typing import Any

import pytest

from rdt_core import PRESETS, RDT, ModelConfig
from rdt_core.flops import layer_flops, sequence_flops, unread_flops

WHOLE = "want a whole number >="
BAD_FIELDS: list[tuple[str, Any, str]] = [
    *((name, 0, f"{WHOLE} 1") for name in ("vocab_size", "d_model", "n_heads", "d_ff")),
    *((name, -3, f"{WHOLE} 1") for name in ("gate_hidden_dim", "total_steps", "max_steps")),
    *(("max_seq_len", n, f"{WHOLE} 3") for n in (-3, 2)),
    ("suppress_tokens", 5, "want a list of tokens"),
    *((name, -1, "a whole number from 0 to 1000") for name in ("n_decoder_layers", "n_prelude_layers")),
    *(("n_encoder_layers", value, "a whole number from 1 to 1000") for value in (0, 10**9)),
    ("max_steps", True, f"{WHOLE} 1"),
    ("d_model", 64.0, f"{WHOLE} 1"),
    *((name, 10**30, "a whole number from 1 to 2147483647") for name in ("d_model", "vocab_size", "max_steps")),
    ("threshold", 10**400, "a finite number >= 0"),
    ("gate_shortlist", -1, "a whole number from 0 to 30522"),
    ("gate_shortlist", 30_523, "a whole number from 0 to 30522"),
    ("gate_shortlist", 2.0, "a whole number from 0 to 30522"),
    ("d_model", 200, "multiple of 2 x n_heads = 16"),
    ("dropout", 1.0, "0 <= dropout < 1"),
    ("dropout", -0.1, "0 <= dropout < 1"),
    ("dropout", math.nan, "0 <= dropout < 1"),
    ("dropout", "0.1", "want a number"),
    ("threshold", -0.01, "a finite number >= 0"),
    ("threshold", math.inf, "a finite number >= 0"),
    ("threshold", math.nan, "a finite number >= 0"),
    ("threshold", None, "want a number"),
    ("decoder_type", "mlp", "one of linear, dense, transformer"),
    ("norm", "none", "one of pre, post"),
    ("positions", "sine", "one of rotary, learned"),
    ("halting", "never", "one of gate, settle"),
    ("level_conditioning", "false", "want true or false"),
]


@pytest.mark.parametrize(("field", "value", "wanted"), BAD_FIELDS)
def test_a_bad_field_is_refused_with_its_name_value_and_range(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is ") as refusal:
        ModelConfig(**{field: value})
    assert repr(value) in str(refusal.value)
    assert wanted in str(refusal.value)


def test_only_rotary_positions_need_pairs() -> None:
    assert ModelConfig(d_model=120, positions="learned").d_model == 120
    with pytest.raises(ValueError, match=r"^d_model is 100: want a multiple of n_heads = 8$"):
        ModelConfig(d_model=100, positions="learned")


@pytest.mark.parametrize("token", [-1, 100, 1.5, "a"])
def test_suppress_tokens_must_be_in_the_vocabulary(token: object) -> None:
    with pytest.raises(ValueError, match=f"^suppress_tokens has {token!r}.*vocab_size = 100"):
        ModelConfig(vocab_size=100, suppress_tokens=(5, token))


def test_a_transformer_decoder_needs_layers() -> None:
    with pytest.raises(ValueError, match=r"^n_decoder_layers is 0: want >= 1"):
        ModelConfig(decoder_type="transformer")


def test_a_shortlist_has_only_tokens_that_may_be_answers_and_belongs_to_decoders_without_layers() -> None:
    with pytest.raises(ValueError, match=r"^gate_shortlist is 99: want a whole number from 0 to 98$"):
        ModelConfig(vocab_size=100, suppress_tokens=(0, 4), gate_shortlist=99)
    assert ModelConfig(vocab_size=100, suppress_tokens=(0, 4), gate_shortlist=98).gate_shortlist == 98
    assert ModelConfig(vocab_size=100, suppress_tokens=(4, 0, 4, 4), gate_shortlist=98).suppress_tokens == (4, 0)
    with pytest.raises(ValueError, match=r"^gate_shortlist is 1: want 0 with decoder_type 'transformer'"):
        ModelConfig(decoder_type="transformer", n_decoder_layers=1, gate_shortlist=1)


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^n_layers is not a model setting; known: .*n_heads"):
        ModelConfig.from_mapping({"d_model": 64, "n_layers": 3})


def test_a_config_survives_the_way_through_plain_values() -> None:
    config = ModelConfig(vocab_size=100, suppress_tokens=[0, 4], halting="settle", n_prelude_layers=1)
    assert config.suppress_tokens == (0, 4)
    assert ModelConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("name", "shape"), [("small", (256, 4, 4, 1024)), ("base", (512, 8, 6, 2048)), ("large", (768, 12, 12, 3072))]
)
def test_presets_have_their_published_shapes_and_build(name: str, shape: tuple[int, ...]) -> None:
    config = PRESETS[name]
    assert (config.d_model, config.n_heads, config.n_encoder_layers, config.d_ff) == shape
    model = RDT(config.with_changes(vocab_size=10, n_encoder_layers=1))
    assert model.embedding.weight.shape == (10, shape[0])


def test_a_linear_decoder_has_no_layers_to_count() -> None:
    linear, layers = ModelConfig(n_decoder_layers=4), ModelConfig(n_decoder_layers=4, decoder_type="transformer")
    assert (linear.n_coda_layers, layers.n_coda_layers) == (0, 4)
    assert sequence_flops(linear, 10, 2, 3) == sequence_flops(ModelConfig(), 10, 2, 3)
    dense = ModelConfig(decoder_type="dense")
    assert sequence_flops(dense, 10, 2, 3) == sequence_flops(linear, 10, 2, 3) + 2 * 2 * dense.d_model**2
    assert sequence_flops(layers, 10, 2, 3) == sequence_flops(linear, 10, 2, 3) + 40 * layer_flops(linear, 10)


def test_a_row_that_nobody_reads_spares_its_part_of_the_last_layer_but_for_keys_queries_and_values() -> None:
    linear, layers = ModelConfig(), ModelConfig(n_decoder_layers=4, decoder_type="transformer")
    assert unread_flops(linear) == layer_flops(linear, 0) - 2 * 3 * linear.d_model**2
    assert unread_flops(layers) == 0, "the decoder's layers read everything"


def test_something_must_be_left_to_answer() -> None:
    with pytest.raises(ValueError, match="the whole vocabulary"):
        ModelConfig(vocab_size=3, suppress_tokens=(0, 1, 2, 2))


def test_changes_are_checked_as_settings_are() -> None:
    assert ModelConfig().with_changes(d_model=64).d_model == 64
    with pytest.raises(ValueError, match="n_layers is not a model setting"):
        ModelConfig().with_changes(n_layers=3)


def test_a_truth_value_is_no_token() -> None:
    with pytest.raises(ValueError, match="suppress_tokens has True: want 0 <= token < vocab_size"):
        ModelConfig(suppress_tokens=(True,))
