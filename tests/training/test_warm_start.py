from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import RDT, ModelConfig, Tokenizer, checkpoint
from rdt_core.checkpoint import CheckpointError
from training.config import ConfigError
from training.warm_start import stacked, warm_start


@pytest.fixture
def model(tiny_config: ModelConfig) -> RDT:
    return RDT(tiny_config)


def bert(folder: Path, tokenizer: Tokenizer, **changes: int) -> torch.Tensor:
    """A random BERT in a folder; its word embeddings."""
    transformers: Any = pytest.importorskip("transformers")
    shape = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    source = transformers.BertModel(transformers.BertConfig(**(shape | changes), intermediate_size=32))
    source.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    table = source.get_input_embeddings().weight.detach()
    assert isinstance(table, torch.Tensor)
    return table


def test_a_table_is_copied_and_scaled_like_a_fresh_one(model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = bert(tmp_path, tiny_tokenizer)
    others = {name: p.clone() for name, p in model.named_parameters() if name != "embedding.weight"}
    said = warm_start(model, tmp_path, tiny_tokenizer)
    assert said.startswith(f"training.init_from {tmp_path}: the token embeddings; all else is fresh")
    assert model.embedding.weight.std().item() == pytest.approx(16**-0.5, rel=1e-4)
    cosine = torch.cosine_similarity(model.embedding.weight, table, dim=1)
    assert cosine[table.any(1)].min() > 0.9999
    assert model.embedding.weight.requires_grad
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in others.items())


def test_a_table_stored_in_fewer_digits_is_scaled_with_all_of_them(
    model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bert(tmp_path, tiny_tokenizer)
    transformers: Any = pytest.importorskip("transformers")
    transformers.AutoModel.from_pretrained(tmp_path).bfloat16().save_pretrained(tmp_path)
    warm_start(model, tmp_path, tiny_tokenizer)
    assert model.embedding.weight.std().item() == pytest.approx(16**-0.5, rel=1e-4)


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"vocab_size": 50}])
def test_a_table_of_another_shape_is_refused(
    model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, int]
) -> None:
    bert(tmp_path, tiny_tokenizer, **changes)
    with pytest.raises(ConfigError, match=r"training.init_from is .*: its embeddings are .*, want \(121, 16\)"):
        warm_start(model, tmp_path, tiny_tokenizer)


def test_another_vocabulary_is_refused(model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    values = json.loads(tiny_tokenizer.json)
    vocabulary = values["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = vocabulary["dog"], vocabulary["fox"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"its vocabulary is not this tokenizer's"):
        warm_start(model, tmp_path, tiny_tokenizer)


def test_a_folder_without_a_model_is_refused(model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.init_from is .*: want a folder with config.json and weights"):
        warm_start(model, tmp_path, tiny_tokenizer)


def test_a_folder_whose_weights_lack_the_table_is_refused(
    model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`transformers` fills it with random numbers, as where a wrapper has changed the names of all weights."""
    bert(tmp_path, tiny_tokenizer)
    file = tmp_path / "model.safetensors"
    safetensors: Any = pytest.importorskip("safetensors.torch")
    weights = {f"wrapper.{name}": weight for name, weight in safetensors.load_file(file).items()}
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"training.init_from is .*: it has no embeddings\.word_embeddings\.weight"):
        warm_start(model, tmp_path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), r"its embeddings\.word_embeddings\.weight holds values that are not finite numbers"),
        (0.5, "all values of its embeddings are the same"),
    ],
)
def test_a_table_that_cannot_be_learnt_from_is_refused(
    model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path, value: float, problem: str
) -> None:
    table = bert(tmp_path, tiny_tokenizer)
    file = tmp_path / "model.safetensors"
    safetensors: Any = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(file)
    weights["embeddings.word_embeddings.weight"] = torch.full_like(table, value)
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"training.init_from is .*: {problem}"):
        warm_start(model, tmp_path, tiny_tokenizer)


def test_a_checkpoint_of_this_project_gives_everything(model: RDT, tiny_model: RDT, tiny_checkpoint: Path) -> None:
    saved = checkpoint.read(tiny_checkpoint)
    tokenizer = checkpoint.tokenizer_of(tiny_checkpoint, saved)
    warm_start(model, tiny_checkpoint, tokenizer)
    assert all(torch.equal(tensor, tiny_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    wider = RDT(model.config.with_changes(d_ff=64))
    with pytest.raises(CheckpointError, match=r"feed_forward.* has shape"):
        warm_start(wider, tiny_checkpoint, tokenizer)


def test_a_checkpoint_of_other_words_is_refused(model: RDT, tiny_tokenizer: Tokenizer, tiny_checkpoint: Path) -> None:
    other = Tokenizer(tiny_tokenizer.json.replace('"fox"', '"vixen"'))
    with pytest.raises(ConfigError, match=r"best_model\.pt'?: its tokenizer is not data\.tokenizer_name's"):
        warm_start(model, tiny_checkpoint, other)


def test_a_deeper_encoder_takes_the_layers_of_a_shallower_one_again_and_again(
    tiny_model: RDT, tiny_checkpoint: Path
) -> None:
    theirs = tiny_model.state_dict()
    tokenizer = checkpoint.tokenizer_of(tiny_checkpoint, checkpoint.read(tiny_checkpoint))
    deeper = RDT(tiny_model.config.with_changes(n_encoder_layers=3))
    warm_start(deeper, tiny_checkpoint, tokenizer)
    assert all(torch.equal(deeper.state_dict()[name], weight) for name, weight in theirs.items())
    for name, weight in deeper.encoder[0].state_dict().items():
        assert all(torch.equal(layer.state_dict()[name], weight) for layer in deeper.encoder)


def test_layers_are_stacked_in_order() -> None:
    weights = {f"encoder.{i}.w": torch.tensor(float(i)) for i in range(2)} | {"prelude.0.w": torch.tensor(9.0)}
    grown = stacked(weights, 2, 5)
    assert [grown[f"encoder.{i}.w"].item() for i in range(5)] == [0, 1, 0, 1, 0]
    assert len(grown) == 6
    assert stacked(weights, 2, 2) == stacked(weights, 2, 1) == weights


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ([1], "model_state_dict is not a dictionary of tensors"),
        ({0: torch.ones(1)}, "model_state_dict is not a dictionary of tensors"),
        ({"encoder.².weight": torch.ones(1)}, "model_state_dict has no "),
    ],
)
def test_weights_that_are_none_are_refused(
    model: RDT, tiny_checkpoint: Path, tmp_path: Path, spoilt: Any, problem: str
) -> None:
    loaded = checkpoint.load(tiny_checkpoint)
    checkpoint.save(tmp_path / "spoilt.pt", replace(loaded.checkpoint, model_state_dict=spoilt))
    with pytest.raises(CheckpointError, match=problem):
        warm_start(model, tmp_path / "spoilt.pt", loaded.tokenizer)


def test_as_many_heads_are_wanted(tiny_model: RDT, tiny_checkpoint: Path) -> None:
    other = RDT(replace(tiny_model.config, n_heads=2 * tiny_model.config.n_heads))
    with pytest.raises(ConfigError, match=f"its n_heads is {tiny_model.config.n_heads}, model.n_heads is"):
        warm_start(other, tiny_checkpoint, checkpoint.load(tiny_checkpoint).tokenizer)


def test_weights_do_not_tell_their_norms_nor_the_unit_of_their_levels(tiny_model: RDT, tiny_checkpoint: Path) -> None:
    tokenizer = checkpoint.load(tiny_checkpoint).tokenizer
    with pytest.raises(ConfigError, match=r"its norm is pre, model\.norm is post"):
        warm_start(RDT(replace(tiny_model.config, norm="post")), tiny_checkpoint, tokenizer)
    n_steps = tiny_model.config.total_steps
    said = warm_start(RDT(replace(tiny_model.config, total_steps=n_steps + 1)), tiny_checkpoint, tokenizer)
    assert said.endswith(f"everything; its gate was taught with training.total_steps = {n_steps}")


def test_a_gate_that_reads_a_shortlist_starts_from_one_that_does_not(
    tiny_model: RDT, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """And the other way: what says how sure a token is begins anew, all else is taken."""
    loaded = checkpoint.load(tiny_checkpoint)
    other = RDT(tiny_model.config.with_changes(gate_shortlist=0))
    fresh = {name: weight.clone() for name, weight in other.state_dict().items()}
    said = warm_start(other, tiny_checkpoint, loaded.tokenizer)
    assert said.endswith("everything but the token level, which is fresh")
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, fresh[name] if name.startswith("gate.token.") else tiny_model.state_dict()[name])
    plain = tmp_path / "plain.pt"
    config = {"model": other.config.to_mapping(), "name": "plain"}
    checkpoint.save(plain, replace(loaded.checkpoint, model_state_dict=other.state_dict(), config=config))
    assert warm_start(RDT(tiny_model.config), plain, loaded.tokenizer).endswith("which is fresh")
    longer = RDT(tiny_model.config.with_changes(gate_shortlist=tiny_model.config.gate_shortlist + 1))
    assert warm_start(longer, tiny_checkpoint, loaded.tokenizer).endswith("everything")


def test_a_vocabulary_of_lines_is_compared_too(model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    pieces = tiny_tokenizer.pieces
    for lines, problem in ((pieces, "no file named"), (pieces[::-1], "its vocabulary is not this tokenizer's")):
        (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=problem):
            warm_start(model, tmp_path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (("tokenizer.json", "{}"), "its tokenizer is none that can be read"),
        (("config.json", '{"model_type": "no such"}'), ".*no such"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(
    model: RDT, tiny_tokenizer: Tokenizer, tmp_path: Path, bad: tuple[str, str], problem: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (tmp_path / bad[0]).write_text(bad[1], encoding="utf-8")
    with pytest.raises(ConfigError, match=f"training.init_from is '{tmp_path}': {problem}"):
        warm_start(model, tmp_path, tiny_tokenizer)
