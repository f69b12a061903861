"""A model that starts as a BERT is that BERT in its first pass: compared with the transformers library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdt_core import RDT, ModelConfig, Packing, Tokenizer
from training.config import ConfigError
from training.warm_start import warm_start

LENGTHS = [7, 3, 12]
CLOSE = {"atol": 1e-3, "rtol": 1e-3}  # what their norms add to a variance is 1e-12, and 1e-5 here


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.with_changes(
        norm="post", positions="learned", decoder_type="dense", n_encoder_layers=3, suppress_tokens=(), max_seq_len=20
    )


def saved(transformers: Any, kind: str, config: ModelConfig, folder: Path, **changes: Any) -> Any:
    """A random BERT of a model's shape, every weight of which tells, in a folder."""
    shape = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_attention_heads": config.n_heads,
        "num_hidden_layers": 3, "intermediate_size": config.d_ff, "max_position_embeddings": 24,
    }  # fmt: skip
    torch.manual_seed(0)
    source = getattr(transformers, kind)(transformers.BertConfig(**(shape | changes))).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source.save_pretrained(folder)
    return source


def texts(config: ModelConfig) -> list[Tensor]:
    return [torch.randint(config.vocab_size, (length,)) for length in LENGTHS]


@torch.no_grad()
def first_pass(model: RDT, sequences: list[Tensor]) -> tuple[Tensor, Packing]:
    packing = Packing.of([len(sequence) for sequence in sequences])
    tokens = torch.cat(sequences)
    return model(model.begin(tokens, torch.ones_like(tokens, dtype=torch.bool), packing), packing).hidden, packing


@torch.no_grad()
def test_the_first_pass_is_its_masked_word_model(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = saved(transformers, "BertForMaskedLM", config, tmp_path)
    model = RDT(config).eval()
    said = warm_start(model, tmp_path, tiny_tokenizer)
    assert "positions and 3 of 3 layers, and the head; fresh are the gate, how the input is fed back" in said
    assert model.embedding.weight.std().item() == pytest.approx(config.d_model**-0.5, rel=1e-4)
    sequences = texts(config)
    hidden, packing = first_pass(model, sequences)
    expected = torch.cat([source(sequence[None]).logits[0] for sequence in sequences])
    torch.testing.assert_close(model.decode(hidden, packing), expected, **CLOSE)


def test_a_head_with_a_table_of_its_own_is_left(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved(transformers, "BertForMaskedLM", config, tmp_path, tie_word_embeddings=False)
    assert "and the decoder" in warm_start(RDT(config), tmp_path, tiny_tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_fewer_layers_are_its_first_ones(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, n_layers: int
) -> None:
    source = saved(transformers, "BertModel", config, tmp_path)
    model = RDT(config.with_changes(n_encoder_layers=n_layers)).eval()
    said = warm_start(model, tmp_path, tiny_tokenizer)
    assert f"{n_layers} of 3 layers; fresh are the gate, how the input is fed back, and the decoder" in said
    sequences = texts(config)
    hidden, _ = first_pass(model, sequences)
    theirs = [source(sequence[None], output_hidden_states=True).hidden_states[n_layers][0] for sequence in sequences]
    torch.testing.assert_close(hidden, torch.cat(theirs), **CLOSE)


def test_a_bert_of_other_words_is_refused(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved(transformers, "BertModel", config, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_tokenizer.pieces[::-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"training\.init_from is .*: its vocabulary is not this tokenizer's"):
        warm_start(RDT(config), tmp_path, tiny_tokenizer)


def test_nothing_is_said_over_its_shoulder(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    saved(request.getfixturevalue("transformers"), "BertModel", config, tmp_path)
    capfd = request.getfixturevalue("capfd")
    capfd.readouterr()
    warm_start(RDT(config), tmp_path, tiny_tokenizer)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(
    params=[
        ({"num_attention_heads": 4}, {}, r"model.n_heads is 2: want 4, as there"),
        ({"intermediate_size": 40}, {}, r"model.d_ff is \d+: want 40, as there"),
        ({}, {"n_prelude_layers": 1}, r"model.n_prelude_layers is 1: want 0, as there"),
        ({"vocab_size": 50}, {}, r"its embeddings are \(50, 16\), want \(121, 16\)"),
        ({}, {"n_encoder_layers": 4}, r"model.n_encoder_layers is 4: want 1 to 3"),
        ({}, {"max_seq_len": 25}, r"model.max_seq_len is 25: want 3 to 24"),
        ({"hidden_act": "relu"}, {}, r"its hidden_act is 'relu': want 'gelu'"),
        ({"is_decoder": True}, {}, r"its is_decoder is True: want False"),
        ({"layer_norm_eps": 1e-2}, {}, r"its layer_norm_eps is 0.01: want 1e-05"),
    ],
    ids=lambda param: param[2],
)
def misfit(request: pytest.FixtureRequest) -> Any:
    """Of a BERT's settings, of the model's, and what is said of them."""
    return request.param


def test_another_shape_is_refused(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, misfit: Any
) -> None:
    theirs, ours, wanted = misfit
    saved(transformers, "BertModel", config, tmp_path, **theirs)
    with pytest.raises(ConfigError, match=f"training.init_from is .*: {wanted}"):
        warm_start(RDT(config.with_changes(**ours)), tmp_path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("{}", "Unrecognized model|Should have a `model_type`|no file named"),
        ('{"model_type": "bert"}', "no file named"),
        ('{"model_type": "roberta"}', r"its model_type is 'roberta': want 'bert' with norm: post, positions: learned"),
    ],
)
def test_what_is_no_bert_is_refused(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, settings: str, wanted: str
) -> None:
    (tmp_path / "config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"training\.init_from is '{tmp_path}': .*({wanted})"):
        warm_start(RDT(config), tmp_path, tiny_tokenizer)


@torch.no_grad()
def test_the_names_of_its_first_files_are_known(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Those of 2018 call a norm's weights gamma and beta, and have the bias once."""
    source = saved(transformers, "BertForMaskedLM", config, tmp_path)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in source.state_dict().items()
        if not name.startswith("cls.predictions.decoder")
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = RDT(config).eval()
    assert "and the head; fresh" in warm_start(model, tmp_path, tiny_tokenizer)
    sequence = texts(config)[0]
    hidden, packing = first_pass(model, [sequence])
    torch.testing.assert_close(model.decode(hidden, packing), source(sequence[None]).logits[0], **CLOSE)


def test_a_bert_that_lost_weights_is_refused(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = saved(transformers, "BertModel", config, tmp_path)
    weights = {name: w for name, w in source.state_dict().items() if "layer.1.attention.output.dense" not in name}
    source.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match=r"it has no bert\.encoder\.layer\.1\.attention\.output\.dense\.bias"):
        warm_start(RDT(config), tmp_path, tiny_tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bert_with_values_that_are_no_numbers_is_refused(
    transformers: Any, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, value: float
) -> None:
    source = saved(transformers, "BertModel", config, tmp_path)
    source.encoder.layer[2].output.dense.bias.data[3] = value
    source.save_pretrained(tmp_path)
    problem = r"its bert\.encoder\.layer\.2\.output\.dense\.bias holds values that are not finite numbers"
    with pytest.raises(ConfigError, match=f"training.init_from is .*: {problem}"):
        warm_start(RDT(config), tmp_path, tiny_tokenizer)
