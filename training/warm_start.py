"""Start a model from existing weights: a checkpoint of this project, or a BERT-like one in a folder.

Of a checkpoint of this project everything is taken. Shape and vocabulary must be the same, except that a deeper encoder
may start from a shallower one, whose layers are repeated.

Of a BERT-like one only the token embedding table is taken. This model uses it on both ends, scaled to the variance of
a fresh table. Positions (rotary here), layers (pre-norm here, post-norm there) and heads are not taken. A model with
`norm: post` and `positions: learned` takes positions and layers, too, and with `decoder_type: dense` the head:
`training.bert`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdt_core import checkpoint
from rdt_core.model import RDT
from rdt_core.tokenizer import Tokenizer
from training.bert import check_numbers, copy_bert, embedding_scale, has_its_shape
from training.config import ConfigError, one_line
from training.optimise import average_note


@torch.no_grad()
def warm_start(model: RDT, source: str | Path, tokenizer: Tokenizer) -> str:
    """Copy what fits from a checkpoint file or a folder; returns, in words, what that was.

    Raises `ConfigError` and `CheckpointError`.
    """
    source, named = Path(source), "training.init_from"
    where = f"{named} is {str(source)!r}"
    if source.is_file():
        return f"{named} {source}: {_copy_all(model, source, tokenizer, where)}"
    if has_its_shape(model.config):
        _check_folder(source, tokenizer, where)
        return f"{named} {source}: {copy_bert(model, source, where)}"
    copy_embeddings(model.embedding, source, tokenizer, named)
    return f"{named} {source}: the token embeddings; all else is fresh (layers want norm: post, positions: learned)"


def _copy_all(model: RDT, path: Path, tokenizer: Tokenizer, where: str) -> str:
    saved = checkpoint.read(path)
    if checkpoint.tokenizer_of(path, saved).json != tokenizer.json:
        raise ConfigError(f"{where}: its tokenizer is not data.tokenizer_name's")
    theirs = checkpoint.model_config(path, saved)
    for name in ("n_heads", "norm"):  # not visible in the shapes of the weights
        if (there := getattr(theirs, name)) != (here := getattr(model.config, name)):
            raise ConfigError(f"{where}: its {name} is {there}, model.{name} is {here}")
    weights = stacked(saved.model_state_dict, theirs.n_encoder_layers, model.config.n_encoder_layers)
    taken = "everything"
    if bool(theirs.gate_shortlist) != bool(model.config.gate_shortlist):  # their token level reads something else
        fresh = {name: weight for name, weight in model.state_dict().items() if name.startswith("gate.token.")}
        weights, taken = weights | fresh, "everything but the token level, which is fresh"
    checkpoint.check_weights(path, model, weights)
    model.load_state_dict(weights)
    taken += average_note(saved)
    if theirs.total_steps != model.config.total_steps:
        taken += f"; its gate was taught with training.total_steps = {theirs.total_steps}"
    return taken


def stacked(weights: dict[str, Tensor], n_layers: int, n_wanted: int) -> dict[str, Tensor]:
    """The weights of an encoder of `n_wanted` layers out of one of `n_layers`: layer `i` is theirs `i mod n_layers`.

    Progressive stacking (Gong et al., 2019). With fewer layers than theirs nothing is changed: `check_weights` refuses.
    """
    grown = dict(weights)
    for name, weight in weights.items():
        if found := re.fullmatch(r"encoder\.(\d+)\.(.+)", name):
            grown |= {f"encoder.{i}.{found[2]}": weight for i in range(int(found[1]), n_wanted, n_layers)}
    return grown


@torch.no_grad()
def copy_embeddings(table: nn.Embedding, folder: Path, tokenizer: Tokenizer, named: str) -> None:
    """The token embeddings of the BERT-like model in a folder, scaled to the variance of a fresh table.

    Raises `ConfigError`, in which the setting is called `named`.
    """
    where = f"{named} is {str(folder)!r}"
    found = _word_embeddings(folder, tokenizer, where)
    wanted = tuple(table.weight.shape)
    if tuple(found.shape) != wanted:
        raise ConfigError(f"{where}: its embeddings are {tuple(found.shape)}, want {wanted}")
    table.weight.copy_(found * embedding_scale(found, where))


def _check_folder(folder: Path, tokenizer: Tokenizer, where: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where}: want a folder with config.json and weights")
    theirs = _vocabulary(folder, where)
    if theirs is not None and theirs != json.loads(tokenizer.json)["model"]["vocab"]:
        raise ConfigError(f"{where}: its vocabulary is not this tokenizer's")


def _vocabulary(folder: Path, where: str) -> Any:
    """The vocabulary of the tokenizer beside the weights, piece -> id; None if there is none."""
    file, pieces = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        if pieces.is_file():
            return {piece: i for i, piece in enumerate(pieces.read_text(encoding="utf-8").split("\n")) if piece}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: its tokenizer is none that can be read") from error
    return None


def _word_embeddings(folder: Path, tokenizer: Tokenizer, where: str) -> Tensor:
    _check_folder(folder, tokenizer, where)
    from transformers import AutoModel  # noqa: PLC0415 - heavy, and only for a warm start

    try:
        source, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # of many kinds: no weights, truncated ones, a model that nobody knows
        raise ConfigError(f"{where}: {one_line(error)[:300]}") from error
    table = source.get_input_embeddings().weight
    lost = set(report["missing_keys"])  # these are random
    name = next(name for name, weight in source.named_parameters() if weight is table)
    if name in lost:
        raise ConfigError(f"{where}: it has no {name}")
    found = table.detach().float()  # it may be stored in another format
    check_numbers([(name, found)], where)
    return found
