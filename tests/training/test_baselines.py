"""What the baselines are equal in, and what they differ in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import training
from rdt_core import RDT, ModelConfig, Tokenizer, flops
from training.config import TrainConfig
from training.config_file import load_config
from training.data import Batches
from training.optimise import learning_rate_factor
from training.trainer import model_config

CONFIGS = Path(training.__file__).parent / "configs"
BASELINES = sorted((CONFIGS / "baselines").glob("*.yaml"))
BERT_PIECES = 30_522
EQUAL_DEPTH = 3


def baseline(name: str) -> TrainConfig:
    return load_config(CONFIGS / "rdt-small.yaml", CONFIGS / "baselines" / f"{name}.yaml")


def small() -> TrainConfig:
    return load_config(CONFIGS / "rdt-small.yaml")


def shape(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    few = replace(config, model=replace(config.model, gate_shortlist=1))  # as the tokenizer's pieces are
    return model_config(few, tokenizer).with_changes(vocab_size=BERT_PIECES, gate_shortlist=config.model.gate_shortlist)


def differences(name: str) -> dict[str, Any]:
    ours, theirs = small().to_mapping(), baseline(name).to_mapping()
    return {
        f"{section}.{key}": value
        for section in ("model", "training", "data")
        for key, value in theirs[section].items()
        if value != ours[section][key]
    }


ONE_PASS = {
    "model.max_steps": 1,
    "training.max_chain_length": 1,
    "training.grad_passes": 1,
    "training.gate_steps": 0,
}
BRANCH = {
    "training.num_steps": 600,
    "training.one_pass_steps": 0,
    "training.warmup_steps": 20,
    "training.decay_ratio": 1.0,
}
"""Of what starts where rdt-small's one pass ends, with a fresh optimizer."""


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("one-pass", {"training.num_steps": 5350}),
        ("one-pass-deep", BRANCH | {"model.n_encoder_layers": 9}),
        ("masked-diffusion", BRANCH | {"training.total_steps": 100}),
    ],
)
def test_a_baseline_differs_in_what_it_is_about_alone(name: str, more: dict[str, Any]) -> None:
    assert differences(name) == ONE_PASS | more


def test_every_encoder_learns_from_as_many_steps() -> None:
    shared = small().training.one_pass_steps
    ours = small().training
    assert ours.num_steps is not None
    assert ours.num_steps - ours.gate_steps - shared == BRANCH["training.num_steps"]
    assert baseline("one-pass").training.num_steps == shared + BRANCH["training.num_steps"]
    factor = learning_rate_factor(ours, ours.num_steps)
    assert [factor(step) for step in (shared - 1, shared, shared + 300, shared + 600 - 1)] == [1, 1, 0.5, 1 / 600]
    one_pass = baseline("one-pass").training
    assert [learning_rate_factor(one_pass, 5350)(step) for step in (shared, shared + 300)] == [1, 0.5]


def test_every_baseline_is_named_in_the_table() -> None:
    table = (CONFIGS / "baselines" / "README.md").read_text(encoding="utf-8")
    assert BASELINES
    for path in BASELINES:
        assert f"`{path.name}`" in table
        assert load_config(CONFIGS / "rdt-small.yaml", path).name == path.stem


def test_one_pass_has_the_parameters_of_the_model(tiny_tokenizer: Tokenizer) -> None:
    ours, theirs = (RDT(shape(config, tiny_tokenizer)).n_parameters for config in (small(), baseline("one-pass")))
    assert ours == theirs
    assert round(ours / 1e6, 1) == 17.3


def test_the_deep_one_does_the_operations_of_three_passes(tiny_tokenizer: Tokenizer) -> None:
    ours, theirs = shape(small(), tiny_tokenizer), shape(baseline("one-pass-deep"), tiny_tokenizer)
    for length in (128, 256):
        for share in (0.1, 0.5, 0.9):
            n_decoded = round(share * (length - 2))
            wanted = flops.sequence_flops(ours, length, n_decoded, EQUAL_DEPTH)
            found = flops.sequence_flops(theirs, length, n_decoded, 1)
            assert found == pytest.approx(wanted, rel=0.02)


def test_the_figures_in_the_deep_ones_comment_are_those_computed(tiny_tokenizer: Tokenizer) -> None:
    text = (CONFIGS / "baselines" / "one-pass-deep.yaml").read_text(encoding="utf-8")
    stated = [float(value) for value in re.findall(r"([\d.]+) MFLOPs a token against ([\d.]+)", text)[0]]
    ours, theirs = shape(small(), tiny_tokenizer), shape(baseline("one-pass-deep"), tiny_tokenizer)
    n_decoded = round(0.15 * 126)
    found = [flops.sequence_flops(theirs, 128, n_decoded, 1), flops.sequence_flops(ours, 128, n_decoded, EQUAL_DEPTH)]
    assert stated == [round(operations / 128 / 1e6, 1) for operations in found]
    assert f"{RDT(theirs).n_parameters / 1e6:.1f} M against 17.3 M" in text


def test_masked_diffusion_masks_at_uniform_ratios_and_shows_nothing_else(
    make_batches: Any, tiny_tokenizer: Tokenizer
) -> None:
    batches: Batches = make_batches(0)
    section = replace(baseline("masked-diffusion").training, batch_size=4)
    batches.config = replace(batches.config, training=section)
    steps, n_batches = [], 400
    for index in range(n_batches):
        batch = batches[index]
        assert (batch.tokens[batch.masked] == tiny_tokenizer.mask_id).all()
        steps += batch.start_steps.tolist()
    ratios = [step / 100 for step in steps]
    mean = sum(ratios) / len(ratios)
    deviation = (sum((ratio - mean) ** 2 for ratio in ratios) / len(ratios)) ** 0.5
    assert mean == pytest.approx(0.505, abs=0.03)
    assert deviation == pytest.approx(12**-0.5, abs=0.02)
    assert min(ratios) == 0.01
    assert max(ratios) == 1.0
