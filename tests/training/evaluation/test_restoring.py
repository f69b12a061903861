from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rdt_core import RDT, ModelConfig, Packing, Tokenizer, flops, restore
from rdt_core.halting import due
from training.config import ConfigError
from training.evaluation.restoring import Effort, Evaluation, at_depth, cut_segments


@pytest.fixture
def evaluation(tiny_model: RDT, tiny_tokenizer: Tokenizer) -> Evaluation:
    stream = torch.randint(5, tiny_tokenizer.vocab_size, (90,), generator=torch.Generator().manual_seed(0))
    segments = cut_segments(stream, tiny_tokenizer, length=20, at_most=None)
    return Evaluation(tiny_model, tiny_tokenizer, segments, seed=0, batch_size=3)


def test_segments_are_contiguous_and_framed(tiny_tokenizer: Tokenizer) -> None:
    segments = cut_segments(torch.arange(10, 33), tiny_tokenizer, length=7, at_most=None)
    assert [segment[1:-1].tolist() for segment in segments] == [list(range(10 + 5 * i, 15 + 5 * i)) for i in range(4)]
    assert all((s[0], s[-1]) == (tiny_tokenizer.cls_id, tiny_tokenizer.sep_id) for s in segments)


def test_fewer_segments_are_spread_over_the_text(tiny_tokenizer: Tokenizer) -> None:
    segments = cut_segments(torch.arange(100), tiny_tokenizer, length=12, at_most=2)
    assert [int(segment[1]) for segment in segments] == [0, 50]


def test_a_text_shorter_than_a_segment_is_an_error(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--text has 3 tokens: want at least 5, which with two more"):
        cut_segments(torch.arange(3), tiny_tokenizer, length=7, at_most=None)


@pytest.mark.parametrize(
    ("halting", "threshold"), [("gate", 0.0), ("settle", 0.0), ("settle", 0.3), ("settle", 0.5), ("settle", 0.7)]
)
def test_the_scores_are_those_of_the_reference(evaluation: Evaluation, halting: str, threshold: float) -> None:
    """Token for token, pass for pass and bit for bit, with thresholds below, between and above the levels."""
    model, mask_id = evaluation.model, evaluation.tokenizer.mask_id
    if halting == "gate":
        scores, _ = evaluation.depths(0.5, 3)
        outcome = at_depth(scores, torch.full((len(evaluation.targets),), 3))
    else:
        outcome = evaluation.settling(0.5, 3, threshold)
    nats, masked = [], evaluation.masked(0.5)
    for own, (targets, hidden_rows) in enumerate(zip(evaluation.targets, masked, strict=True)):
        seen: list[torch.Tensor] = []  # hidden states, pass after pass
        found = restore(model, torch.where(hidden_rows, mask_id, targets), hidden_rows, max_steps=3,
                        threshold=threshold, halting=halting,  # type: ignore[arg-type]
                        observe=lambda _step, _level, state, seen=seen: seen.append(state.hidden))  # fmt: skip
        assert (
            outcome.scores.guesses[outcome.scores.segments == own].tolist()
            == torch.tensor(found.tokens)[hidden_rows].tolist()
        )
        assert outcome.effort.passes[own] == found.steps
        for row, step in zip(found.rows, found.fixed_at, strict=True):
            logits = model.decode(seen[step - 1], Packing.of([20]), torch.tensor([row]))
            nats.append(-logits[0].log_softmax(-1)[targets[row]].item())
    assert outcome.scores.nats.tolist() == pytest.approx(nats, rel=1e-4)


def test_the_levels_of_the_reference_test_are_on_both_sides_of_its_thresholds(evaluation: Evaluation) -> None:
    passes = {threshold: evaluation.settling(0.5, 3, threshold).effort.passes for threshold in (0.0, 0.3, 0.5, 0.7)}
    assert passes[0.0].double().mean() > passes[0.7].double().mean()


def test_settling_counts_passes_until_the_last_token_is_written(evaluation: Evaluation) -> None:
    """9 masked tokens in 16 passes: one in the first, and passes that settle nothing still run."""
    effort = evaluation.settling(0.5, 16).effort
    assert set(evaluation.masked(0.5).sum(1).tolist()) == {9}
    assert set(effort.passes.tolist()) == {16}
    assert set(effort.decodes.tolist()) == {9}
    assert set(effort.rows.tolist()) == {9}
    asked = sum(9 - due(9, done, 16) for done in range(15))  # the level of every row still open, in each pass
    assert set(effort.shortlisted.tolist()) == {asked}


def test_the_masks_of_smaller_ratios_are_inside_those_of_larger_ones(evaluation: Evaluation) -> None:
    assert (evaluation.masked(0.2) <= evaluation.masked(0.6)).all()


def test_the_scores_do_not_depend_on_the_batch_size(evaluation: Evaluation) -> None:
    alone = Evaluation(evaluation.model, evaluation.tokenizer, list(evaluation.targets), seed=0, batch_size=1)
    (together, levels), (one_by_one, levels_alone) = evaluation.depths(0.5, 2), alone.depths(0.5, 2)
    assert torch.equal(together.segments, one_by_one.segments)
    torch.testing.assert_close(together.nats, one_by_one.nats)
    torch.testing.assert_close(levels, levels_alone)


def test_effort_of_one_start_and_one_decode_is_that_of_a_sequence() -> None:
    config = ModelConfig(vocab_size=50, d_model=16, n_heads=2, n_encoder_layers=2, d_ff=32, n_prelude_layers=3)
    effort = Effort(*torch.tensor([[1, 1], [3, 1], [1, 1], [4, 0], [0, 0]]))
    expected = [flops.sequence_flops(config, 10, 4, 3), flops.sequence_flops(config, 10, 0, 1)]
    assert effort.flops(config, 10).tolist() == expected


def test_decoder_layers_run_at_every_decode() -> None:
    plain = ModelConfig(vocab_size=50, d_model=16, n_heads=2, n_encoder_layers=2, d_ff=32, n_prelude_layers=1)
    config = replace(plain, decoder_type="transformer", n_decoder_layers=2)
    effort = Effort(*torch.tensor([[1, 1], [3, 3], [1, 4], [4, 9], [0, 0]]))
    layers = 10 * 2 * flops.layer_flops(config, 10)
    extra = (effort.flops(config, 10) - effort.flops(plain, 10)).tolist()
    assert extra == [layers, 4 * layers]
    assert effort.flops(config, 10)[0] == flops.sequence_flops(config, 10, 4, 3)


def test_work_grows_with_passes_by_the_encoder_alone(tiny_config: ModelConfig) -> None:
    one, three = (flops.sequence_flops(tiny_config, 10, 4, steps) for steps in (1, 3))
    assert three - one == 2 * 10 * flops.pass_flops(tiny_config, 10)
    more_rows = flops.sequence_flops(tiny_config, 10, 5, 1) - one
    assert more_rows == 2 * tiny_config.d_model * tiny_config.vocab_size
