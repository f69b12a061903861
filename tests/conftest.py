"""A model small enough to build in milliseconds, with random weights and a vocabulary of a few words."""

from __future__ import annotations

import gc
import signal
import string
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from rdt_core import RDT, Checkpoint, ModelConfig, Tokenizer, checkpoint
from rdt_core.tokenizer import SPECIAL_TOKENS

try:
    from hypothesis import settings
except ImportError:
    pass  # a bare machine, for tests/gpu
else:
    settings.register_profile("patient", deadline=None)  # a busy machine is no failure
    settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start would inherit it

WORDS = ("the", "quick", "brown", "fox", "jump", "##s", "##ed", "over", "lazy", "dog", "cafe", "new", "york")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No search for garbage in what is imported, which stays: not while it is, and not later."""
    gc.disable()
    result = yield
    gc.enable()
    gc.freeze()
    return result


def tiny_tokenizer_json() -> str:
    """BERT's normalisation and word pieces; every ASCII letter and digit, alone and as a continuation."""
    characters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL_TOKENS, *string.punctuation, *characters, *(f"##{c}" for c in characters), *WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = WordPieceTokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer_json())


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        d_model=16,
        n_heads=2,
        n_encoder_layers=1,
        d_ff=32,
        gate_hidden_dim=8,
        gate_shortlist=6,
        max_seq_len=32,
        suppress_tokens=tuple(sorted(tiny_tokenizer.special_ids)),
        max_steps=8,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig) -> RDT:
    """The same random weights in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RDT(tiny_config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: RDT, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "best_model.pt"
    config = {"model": tiny_model.config.to_mapping(), "name": "tiny"}
    checkpoint.save(path, Checkpoint(tiny_model.state_dict(), config, tiny_tokenizer.json))
    return path
