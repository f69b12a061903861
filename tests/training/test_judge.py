"""The figures of a table's row, counted once more by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sacrebleu
import torch
from torch import Tensor

from rdt_core import RDT, Tokenizer, flops
from training.evaluation.causal import Scorer
from training.evaluation.restoring import Effort, Evaluation, Measured, Outcome, at_depth, cut_segments
from training.evaluation.table import Judge, Point

RATIO, LENGTH = 0.5, 12


class SurprisedByNumber:
    """A left-to-right model that finds a token the less likely the larger its number."""

    @staticmethod
    def bits(texts: Tensor) -> Tensor:
        return texts.double() / 8


@pytest.fixture
def evaluation(tiny_model: RDT, tiny_tokenizer: Tokenizer) -> Evaluation:
    stream = torch.randint(5, tiny_tokenizer.vocab_size, (80,), generator=torch.Generator().manual_seed(3))
    return Evaluation(tiny_model, tiny_tokenizer, cut_segments(stream, tiny_tokenizer, LENGTH, at_most=None), seed=0)


@pytest.fixture
def outcome(evaluation: Evaluation) -> Outcome:
    """Two guesses in three are right, and every token took one bit more than the last one."""
    masked = evaluation.masked(RATIO)
    targets, segments = evaluation.targets[masked], masked.nonzero()[:, 0]
    number = torch.arange(len(targets))
    guesses = torch.where(number % 3 == 0, 5 + number % 2, targets)
    n = len(masked)
    effort = Effort(*(torch.full((n,), value) for value in (1, 3, 2, 7, 5)))
    effort = effort._replace(passes=torch.arange(n) % 3 + 1)
    return Outcome(Measured((guesses == targets).long(), (number + 1) * math.log(2), segments, guesses), effort)


def row_of(evaluation: Evaluation, outcome: Outcome, scorer: Any = None) -> Any:
    judge = Judge(evaluation, scorer)
    return judge.row(RATIO, Point("settle", 2, outcome, depth=4), judge.tallies(RATIO, outcome))


def restored(evaluation: Evaluation, outcome: Outcome) -> list[list[int]]:
    """The text with the guesses in place, token by token."""
    guesses = iter(outcome.scores.guesses.tolist())
    masked = evaluation.masked(RATIO)
    return [
        [next(guesses) if hidden else token for token, hidden in zip(text, hides, strict=True)]
        for text, hides in zip(evaluation.targets.tolist(), masked.tolist(), strict=True)
    ]


def test_single_tokens_and_work(evaluation: Evaluation, outcome: Outcome) -> None:
    row = row_of(evaluation, outcome)
    n_masked, n_segments = len(outcome.scores.guesses), len(evaluation.targets)
    assert (row.kind, row.setting, row.mask_ratio, row.depth) == ("settle", 2, RATIO, 4)
    assert row.exact_match == pytest.approx(outcome.scores.correct.sum().item() / n_masked)
    assert 0.5 < row.exact_match < 0.8
    assert row.bits == pytest.approx((n_masked + 1) / 2)
    assert row.passes == pytest.approx(sum(n % 3 + 1 for n in range(n_segments)) / n_segments)
    config = evaluation.model.config
    encoder = row.passes * flops.pass_flops(config, LENGTH) + config.n_prelude_layers * flops.layer_flops(
        config, LENGTH
    )
    vocabulary = 7 * flops.decode_flops(config) + 5 * flops.shortlist_flops(config)
    assert row.flops_per_token == pytest.approx(encoder + vocabulary / LENGTH)
    assert row.lm_bits is row.lm_excess_bits is None


def test_runs_and_whole_segments(evaluation: Evaluation, outcome: Outcome) -> None:
    row = row_of(evaluation, outcome)
    masked, texts = evaluation.masked(RATIO).tolist(), restored(evaluation, outcome)
    originals = evaluation.targets.tolist()
    for length in (2, 3, 4):
        found = [
            texts[s][start : start + length] == originals[s][start : start + length]
            for s, hides in enumerate(masked)
            for start in range(1, LENGTH - length)
            if all(hides[start : start + length]) and not hides[start - 1] and not hides[start + length]
        ]
        value = getattr(row, f"run_{length}")
        assert value == (pytest.approx(sum(found) / len(found)) if found else None)
    assert 0 < row.run_2 < 1
    pieces = evaluation.tokenizer.pieces
    words, references = ([" ".join(pieces[t] for t in text[1:-1]) for text in some] for some in (texts, originals))
    wanted = sacrebleu.corpus_bleu(words, [references], tokenize="none").score
    assert row.bleu == pytest.approx(wanted)
    assert 0 < row.bleu < 100


def test_segments_without_an_error(evaluation: Evaluation, outcome: Outcome) -> None:
    """One wrong guess in the first and two in the second."""
    guesses = evaluation.targets[evaluation.masked(RATIO)]
    second = int((outcome.scores.segments == 0).sum())
    guesses[[0, second, second + 1]] = guesses[[0, second, second + 1]] % 5 + 5
    assert (guesses != evaluation.targets[evaluation.masked(RATIO)]).sum() == 3
    row = row_of(evaluation, outcome._replace(scores=outcome.scores._replace(guesses=guesses)))
    n_segments = len(evaluation.targets)
    assert n_segments > 3
    assert row.whole == pytest.approx(1 - 2 / n_segments)


@pytest.mark.parametrize(("length", "has_bleu"), [(5, False), (6, True)])
def test_segments_without_four_words_have_no_bleu_of_four(
    tiny_model: RDT, tiny_tokenizer: Tokenizer, length: int, has_bleu: bool
) -> None:
    """sacrebleu gives 0 for them, even to the text itself."""
    stream = torch.arange(5, 17)
    short = Evaluation(tiny_model, tiny_tokenizer, cut_segments(stream, tiny_tokenizer, length, at_most=None), seed=0)
    judge = Judge(short, None)
    outcome = at_depth(short.depths(RATIO, 1)[0], torch.ones(len(short.targets), dtype=torch.int64))
    row = judge.row(RATIO, Point("fixed", 1, outcome), judge.tallies(RATIO, outcome))
    assert (row.bleu is not None) == has_bleu


def test_likelihood_under_a_left_to_right_model(evaluation: Evaluation, outcome: Outcome) -> None:
    scorer: Scorer = SurprisedByNumber()  # type: ignore[assignment]
    row = row_of(evaluation, outcome, scorer)
    texts, originals = torch.tensor(restored(evaluation, outcome)), evaluation.targets
    masked = evaluation.masked(RATIO)
    assert row.lm_bits == pytest.approx((texts[masked] / 8).mean().item())
    assert row.lm_excess_bits == pytest.approx(((texts - originals).sum() / 8 / masked.sum()).item())
    assert row.lm_excess_bits < 0
    assert Judge(evaluation, scorer).original_lm_bits(RATIO) == pytest.approx((originals[masked] / 8).mean().item())
