"""Start a model from a BERT-like checkpoint in a local folder.

What is taken: the token embedding table, which this model uses on both ends, scaled to the variance a
fresh table has. What is not: positions (rotary here), the layers (pre-norm here, post-norm there) and
any head. The folder must use the same vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rdt_core.model import RDT
from rdt_core.tokenizer import Tokenizer
from training.config import ConfigError


@torch.no_grad()
def warm_start(model: RDT, folder: str | Path, tokenizer: Tokenizer) -> None:
    """Copy the token embeddings of the checkpoint in `folder`. Raises `ConfigError`."""
    table = _word_embeddings(Path(folder), tokenizer)
    wanted = tuple(model.embedding.weight.shape)
    if tuple(table.shape) != wanted:
        raise ConfigError(
            f"training.init_from is {str(folder)!r}: its embeddings are {tuple(table.shape)}, want {wanted}"
        )
    model.embedding.weight.copy_(table / table.std() * model.config.d_model**-0.5)


def _word_embeddings(folder: Path, tokenizer: Tokenizer) -> torch.Tensor:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"training.init_from is {str(folder)!r}: want a folder with config.json and weights")
    vocabulary = folder / "tokenizer.json"
    if vocabulary.is_file():
        theirs = json.loads(vocabulary.read_text(encoding="utf-8"))["model"]["vocab"]
        if theirs != json.loads(tokenizer.json)["model"]["vocab"]:
            raise ConfigError(f"training.init_from is {str(folder)!r}: its vocabulary is not data.tokenizer_name's")
    from transformers import AutoModel  # noqa: PLC0415 - heavy, and only for a warm start

    source = AutoModel.from_pretrained(folder, local_files_only=True)
    return source.get_input_embeddings().weight.detach().float()
