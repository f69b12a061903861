"""Start a model as a BERT: of the BERT's shape, so that its first pass computes what the BERT computes.

    BERT (Devlin et al., 2019)                       here, with `norm: post` and `positions: learned`
    LN(word + position + type)                       LN(hidden) + inject(embedded), inject 0 to begin with
    layers                                           the shared encoder, the first `n_encoder_layers` of theirs
    dense, GELU, LN, tied table and bias             the same with `decoder_type: dense`, if the file has them

The gate is fresh. BERT never learnt to continue from the hidden state of a first pass: that remains to be trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdt_core.config import ModelConfig
from rdt_core.layers import EncoderLayer
from rdt_core.model import RDT
from training.config import ConfigError, one_line

LAYER_NORM_EPS = 1e-5
"""Epsilon of every norm here. BERT's own is 1e-12, which makes no difference at the sizes that occur."""

HEAD = "cls.predictions"
BIASES = {f"{HEAD}.bias", f"{HEAD}.decoder.bias"}  # two names of one weight


def has_its_shape(config: ModelConfig) -> bool:
    """Whether a BERT's layers can be taken; if not, only its token embeddings can."""
    return config.norm == "post" and config.positions == "learned"


@torch.no_grad()
def copy_bert(model: RDT, folder: Path, where: str) -> str:
    """Copy layers, positions and embeddings of the BERT in a folder, and its head if both have one; returns, in words,
    what was copied.

    Raises `ConfigError`, which begins with `where`.
    """
    source, missing = _loaded(folder, where)
    source = source.float()  # it may be stored in another format
    _check_shape(model.config, source.config, where)
    check_numbers(source.named_parameters(), where)
    scale = _copy_embeddings(model, source.bert.embeddings, where)
    for ours, theirs in zip(model.encoder, source.bert.encoder.layer, strict=False):  # there may be more of theirs
        assert isinstance(ours, EncoderLayer)
        _copy_layer(ours, theirs)
    lost_head = missing >= BIASES or any(name.startswith(f"{HEAD}.transform.") for name in missing)
    tied = bool(source.config.tie_word_embeddings)
    has_head = model.decoder_dense is not None and tied and not lost_head
    if has_head:
        _copy_head(model, source.cls.predictions, scale)
    layers = f"{len(model.encoder)} of {source.config.num_hidden_layers} layers"
    taken = f"the token embeddings, positions and {layers}{', and the head' * has_head}"
    return f"{taken}; fresh are the gate, how the input is fed back{', and the decoder' * (not has_head)}"


def _loaded(folder: Path, where: str) -> tuple[Any, set[str]]:
    """A `BertForMaskedLM`, and the names of its weights that the folder does not have."""
    from transformers import AutoConfig, BertForMaskedLM  # noqa: PLC0415 - heavy, and only for a warm start

    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "bert":  # it would load without any of its weights
            raise ConfigError(f"{where}: its model_type is {kind!r}: want 'bert' with norm: post, positions: learned")
        with _silent_transformers():
            loaded: Any = BertForMaskedLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds: no weights, truncated ones
        raise ConfigError(f"{where}: {one_line(error)[:300]}") from error
    source, report = loaded
    missing = set(report["missing_keys"])
    if lost := sorted(name for name in missing if not name.startswith("cls.")):
        raise ConfigError(f"{where}: it has no {lost[0]}")
    return source, missing


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its progress bar and its warning of a missing head, which `copy_bert` reports itself."""
    from transformers.utils import logging  # noqa: PLC0415 - heavy

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_shape(config: ModelConfig, theirs: Any, where: str) -> None:
    table, wanted = (theirs.vocab_size, theirs.hidden_size), (config.vocab_size, config.d_model)
    if table != wanted:
        raise ConfigError(f"{where}: its embeddings are {table}, want {wanted}")
    for name, value, ours in (
        ("n_heads", theirs.num_attention_heads, config.n_heads),
        ("d_ff", theirs.intermediate_size, config.d_ff),
        ("n_prelude_layers", 0, config.n_prelude_layers),
    ):
        if value != ours:
            raise ConfigError(f"{where}: model.{name} is {ours}: want {value}, as there")
    if config.n_encoder_layers > theirs.num_hidden_layers:
        raise ConfigError(
            f"{where}: model.n_encoder_layers is {config.n_encoder_layers}: want 1 to {theirs.num_hidden_layers}"
        )
    if config.max_seq_len > theirs.max_position_embeddings:
        raise ConfigError(
            f"{where}: model.max_seq_len is {config.max_seq_len}: want 3 to {theirs.max_position_embeddings}"
        )
    for name, wanted_there in (("hidden_act", "gelu"), ("is_decoder", False), ("layer_norm_eps", LAYER_NORM_EPS)):
        value = getattr(theirs, name)
        if value != wanted_there and not (name == "layer_norm_eps" and value < wanted_there):
            raise ConfigError(f"{where}: its {name} is {value!r}: want {wanted_there!r}")
    if theirs.type_vocab_size < 1:
        raise ConfigError(f"{where}: its type_vocab_size is {theirs.type_vocab_size}: want 1 or more")


def check_numbers(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise `ConfigError` for a weight, given with its name, that has values which are no finite numbers."""
    for name, weight in weights:
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{where}: its {name} holds values that are not finite numbers")


def embedding_scale(table: Tensor, where: str) -> Tensor:
    """What makes the variance of a table `(V, D)` that of a fresh one, `1 / D`. Raises `ConfigError`."""
    if (spread := table.std()) == 0:
        raise ConfigError(f"{where}: all values of its embeddings are the same")
    return table.shape[1] ** -0.5 / spread


def _copy_embeddings(model: RDT, theirs: nn.Module, where: str) -> Tensor:
    """Copy the embeddings, scaled to the variance of a fresh table, which the next norm undoes. Returns the factor."""
    words, types = (_weight(theirs, f"{name}_embeddings") for name in ("word", "token_type"))
    width, scale = model.config.d_model, embedding_scale(words, where)
    model.embedding.weight.copy_(words * scale)
    assert model.position_embedding is not None
    positions = (_weight(theirs, "position_embeddings") + types[0])[: model.config.max_seq_len]
    model.position_embedding.weight.copy_(positions * scale * width**0.5)  # as `RDT.embed` scales words
    model.hidden_norm.load_state_dict(theirs.get_submodule("LayerNorm").state_dict())
    nn.init.zeros_(model.inject.weight)
    return scale


def _copy_layer(ours: EncoderLayer, theirs: nn.Module) -> None:
    for kind in ("weight", "bias"):
        parts = [getattr(theirs.get_submodule(f"attention.self.{name}"), kind) for name in ("query", "key", "value")]
        getattr(ours.attention.qkv, kind).copy_(torch.cat(parts))
    for mine, name in (
        (ours.attention.out, "attention.output.dense"),
        (ours.attention_norm.norm, "attention.output.LayerNorm"),
        (ours.feed_forward.up, "intermediate.dense"),
        (ours.feed_forward.down, "output.dense"),
        (ours.feed_forward_norm.norm, "output.LayerNorm"),
    ):
        mine.load_state_dict(theirs.get_submodule(name).state_dict())


def _copy_head(model: RDT, theirs: nn.Module, scale: Tensor) -> None:
    """The embeddings were multiplied by `scale`, so the norm before their product is divided by it."""
    assert model.decoder_dense is not None
    model.decoder_dense.load_state_dict(theirs.get_submodule("transform.dense").state_dict())
    norm = theirs.get_submodule("transform.LayerNorm")
    for kind in ("weight", "bias"):
        getattr(model.decoder_norm, kind).copy_(getattr(norm, kind) / scale)
    model.decoder_bias.copy_(theirs.get_parameter("bias"))


def _weight(module: nn.Module, name: str) -> Tensor:
    return module.get_submodule(name).get_parameter("weight")
