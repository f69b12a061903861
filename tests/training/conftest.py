"""A few hundred words to learn, and settings of a run that takes a second."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import Tokenizer
from training.config import TrainConfig
from training.config_file import parse_config
from training.corpus import local_corpus
from training.data import Batches

os.environ["HF_HUB_OFFLINE"] = "1"

Settings = Callable[..., TrainConfig]
SENTENCES = ("the quick brown fox jumps over the lazy dog .", "the lazy dog jumped over new york .")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 lines of two sentences."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(random.Random(0).choices(SENTENCES, k=200)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_file(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tiny_tokenizer.json, encoding="utf-8")
    return path


@pytest.fixture
def train_settings(text_file: Path, tokenizer_file: Path, tmp_path: Path) -> Settings:
    """`train_settings(**{"training.batch_size": 2})`: a tiny run under `tmp_path`, with changes."""

    def train_settings(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "mixed_precision": False,  # the same on every machine
            "model": {"d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "d_ff": 32, "gate_hidden_dim": 8}
            | {"dropout": 0.0, "max_seq_len": 32},
            "training": {"batch_size": 4, "num_steps": 8, "learning_rate": 3e-3, "gate_passes": 3, "total_steps": 8},
            "data": {
                "dataset_name": str(text_file),
                "tokenizer_name": str(tokenizer_file),
                "max_seq_length": 16,
                "min_seq_length": 6,
                "cache_dir": str(tmp_path / "cache"),
            },
            "output": {
                "checkpoint_dir": str(tmp_path / "checkpoints"),
                "log_dir": str(tmp_path / "logs"),
                "log_every_n_steps": 1,
                "eval_batches": 1,
            },
        }
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (values[section] if section else values)[name] = value
        return parse_config(values)

    return train_settings


@pytest.fixture
def make_batches(train_settings: Settings, text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """`make_batches(seed, **changes)` over the small corpus."""

    def make_batches(seed: int = 0, **changes: Any) -> Batches:
        corpus = local_corpus(str(text_file), tiny_tokenizer, tmp_path / "cache")
        return Batches(corpus, train_settings(**changes), tiny_tokenizer, seed)

    return make_batches


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


def saved_at(config: TrainConfig, step: int) -> Path:
    (path,) = Path(config.output.checkpoint_dir).glob(f"checkpoint_epoch_*_step_{step}.pt")
    return path
