from __future__ import annotations

import math

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor

from rdt_core import Tokenizer
from training.evaluation import tallies
from training.evaluation.measures import (
    BleuCounter,
    bleu,
    half_width,
    paired_difference,
    per_segment,
    resamples,
    runs,
    share,
)


def bits(text: str) -> Tensor:
    """`"xx.x"` as a row of booleans."""
    return torch.tensor([[character == "x" for character in text]])


@pytest.mark.parametrize(
    ("masked", "right", "length", "whole", "count"),
    [
        ("..xx..xx.", "..xx..x..", 2, 1, 2),
        ("..xxx.xx.", "..xxx.xx.", 2, 1, 1),  # a run of three is no run of two
        ("..xxx.xx.", "..xx...x.", 3, 0, 1),
        ("xxxx", "xxxx", 4, 1, 1),  # to both ends
        (".xxxx", ".xxx.", 4, 0, 1),
        ("x.x.x", "x.x.x", 2, 0, 0),
        (".....", "xxxxx", 2, 0, 0),  # what was shown does not count
    ],
)
def test_a_run_is_right_when_all_of_it_is(masked: str, right: str, length: int, whole: int, count: int) -> None:
    assert [value.tolist() for value in runs(bits(masked), bits(right), length)] == [[whole], [count]]


def test_runs_end_where_their_segment_does() -> None:
    masked = torch.cat((bits("..xx"), bits("x..."), bits("xx.x")))
    assert [value.tolist() for value in runs(masked, masked, 2)] == [[1, 0, 1], [1, 0, 1]]
    assert [value.tolist() for value in runs(masked, masked, 3)] == [[0, 0, 0], [0, 0, 0]]


def test_runs_agree_with_counting_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    masked, correct = torch.rand(2, 40, 30, generator=generator) < 0.6
    for length in (2, 3, 4):
        whole, count = runs(masked, correct, length)
        for index in range(40):
            marks = "".join(("R" if c else "W") if m else " " for m, c in zip(masked[index], correct[index]))  # noqa: B905
            own = [run for run in marks.split() if len(run) == length]
            assert (whole[index], count[index]) == (own.count("R" * length), len(own))


def test_the_share_is_a_ratio_of_sums_with_a_spread_between_segments() -> None:
    hits, counts = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4.0, 4.0, 2.0])
    estimate = share(hits, counts)
    assert estimate.value == pytest.approx(0.6)
    residuals = [1 - 2.4, 3 - 2.4, 2 - 1.2]
    assert estimate.interval == pytest.approx(1.96 * math.sqrt(sum(r * r for r in residuals)) / 10)
    with pytest.raises(ZeroDivisionError):
        share(torch.zeros(3), torch.zeros(3))


def test_the_interval_covers_the_truth_about_19_times_in_20() -> None:
    """1000 samples of 60 segments of a known share: coverage within 4 deviations of 94 %, which 60 segments give."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        level = 0.3 + 0.2 * torch.rand(60, generator=generator)  # segments differ
        hits = (torch.rand(60, 20, generator=generator) < level[:, None]).double().sum(1)
        estimate = share(hits, torch.full((60,), 20.0))
        covered += abs(estimate.value - 0.4) <= estimate.interval
    assert abs(covered / 1000 - 0.945) <= 4 * math.sqrt(0.945 * 0.055 / 1000)


def test_a_paired_interval_is_zero_for_the_same_and_far_tighter_than_an_unpaired_one() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((50,), 10.0)
    hits = torch.randint(0, 10, (50,), generator=generator).double()
    assert paired_difference(hits, hits, counts) == (0.0, 0.0)
    better = hits + (torch.arange(50) % 2)  # half a token more in the mean
    estimate, alone = paired_difference(better, hits, counts), share(hits, counts)
    assert estimate.value == pytest.approx(0.05)
    assert 0 < estimate.interval < alone.interval / 3


def test_two_equally_good_methods_differ_by_nothing_within_the_interval() -> None:
    """Identical in law, not in outcome: the interval contains 0 in about 19 of 20 draws."""
    generator = torch.Generator().manual_seed(0)
    counts, contains = torch.full((60,), 20.0), 0
    for _ in range(400):
        hits, other = (torch.rand(2, 60, 20, generator=generator) < 0.3).double().sum(2)
        estimate = paired_difference(hits, other, counts)
        contains += abs(estimate.value) <= estimate.interval
    assert abs(contains / 400 - 0.945) <= 4 * math.sqrt(0.945 * 0.055 / 400)


def test_half_of_an_interval_leaves_a_fortieth_out_on_either_side() -> None:
    assert half_width(torch.arange(1001.0).flip(0)) == pytest.approx(475)


def test_sums_per_segment() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    assert per_segment(values, torch.tensor([0, 2, 2]), 3).tolist() == [[1, 0, 5], [0, 0, 5]]


def test_resamples_draw_as_many_segments_as_there_are_and_are_the_same_for_a_seed() -> None:
    weights = resamples(7, seed=3, n=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(1) == 7).all()
    assert torch.equal(weights, resamples(7, seed=3, n=50))
    assert not torch.equal(weights, resamples(7, seed=4, n=50))


def texts(n: int, seed: int, vocabulary: int) -> Tensor:
    return torch.randint(5, 5 + vocabulary, (n, 24), generator=torch.Generator().manual_seed(seed))


def test_bleu_of_the_same_text_is_100(tiny_tokenizer: Tokenizer) -> None:
    originals = texts(6, seed=0, vocabulary=40)
    estimate = tallies.estimate(BleuCounter(tiny_tokenizer, originals).of(originals), resamples(6, seed=0))
    assert estimate.value == pytest.approx(100)
    assert estimate.interval == pytest.approx(0, abs=1e-9)


def test_bleu_is_sacrebleus_and_its_interval_that_of_a_bootstrap(tiny_tokenizer: Tokenizer) -> None:
    originals = texts(30, seed=0, vocabulary=40)
    changed = (
        torch.rand(originals.shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 0.5, 30)[:, None]
    )
    restored = torch.where(changed, texts(30, seed=2, vocabulary=40), originals)
    estimate = tallies.estimate(BleuCounter(tiny_tokenizer, originals).of(restored), resamples(30, seed=0))
    hypotheses, references = (
        [" ".join(tiny_tokenizer.piece(token) for token in row[1:-1]) for row in tokens.tolist()]
        for tokens in (restored, originals)
    )
    theirs = BLEU(tokenize="none").corpus_score(hypotheses, [references])
    assert estimate.value == pytest.approx(theirs.score)
    drawn = torch.randint(30, (300, 30), generator=torch.Generator().manual_seed(3)).tolist()
    scores = [
        BLEU(tokenize="none", force=True)
        .corpus_score([hypotheses[i] for i in draw], [[references[i] for i in draw]])
        .score
        for draw in drawn
    ]
    assert estimate.interval == pytest.approx(half_width(torch.tensor(scores).double()), rel=0.2)


def test_bleu_sees_the_order_of_words(tiny_tokenizer: Tokenizer) -> None:
    originals = texts(6, seed=0, vocabulary=40)
    backwards = originals.flip(1)
    assert bleu(BleuCounter(tiny_tokenizer, originals).of(backwards).sum(1)[None]).item() < 20
