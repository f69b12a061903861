from __future__ import annotations

import pytest
import torch

from rdt_core import ModelConfig
from training.evaluation.levels import level_readings
from training.evaluation.restoring import Measured
from training.evaluation.results import LevelReading
from training.report import format_levels

CONFIG = ModelConfig(vocab_size=50, d_model=16, n_heads=2, d_ff=32, total_steps=10)


def measured(guesses: list[list[int]], segments: list[int]) -> Measured:
    found = torch.tensor(guesses)
    return Measured(torch.zeros(found.shape), torch.zeros(found.shape), torch.tensor(segments), found)


def test_what_the_level_says_is_held_against_what_is_left() -> None:
    """Segment 0 changes until the third pass, segment 1 never; segment 2 has nothing masked."""
    scores = measured([[7, 5, 1], [8, 5, 1], [9, 5, 1], [9, 5, 1]], segments=[0, 0, 1])
    levels = torch.tensor([[0.4, 0.1, 0.0], [0.2, 0.1, 0.0], [0.1, 0.1, 0.0], [0.0, 0.0, 0.0]])
    first, second = level_readings(scores, levels, CONFIG, 0.3)
    assert (first.mask_ratio, first.after, first.said, first.left, first.off) == pytest.approx((0.3, 1, 2.5, 1, 1.5))
    assert (second.after, second.said, second.left, second.off) == pytest.approx((2, 1.5, 0.5, 1))
    assert first.correlation == second.correlation == pytest.approx(1)


def test_the_correlation_is_pearsons_and_may_not_be_there() -> None:
    guesses = [[1, 1, 1, 1], [1, 2, 1, 2], [1, 2, 3, 2], [1, 2, 3, 4]]  # 0, 1, 2 and 3 passes left after the first
    levels = torch.tensor([[0.3, 0.1, 0.5, 0.2]]).expand(4, 4)
    scores = measured(guesses, [0, 1, 2, 3])
    expected = torch.corrcoef(torch.stack((levels[0], torch.tensor([0.0, 1, 2, 3]))))[0, 1].item()
    found = next(level_readings(scores, levels, CONFIG, 0.5))
    assert found.correlation == pytest.approx(expected, abs=1e-6)
    assert found.off == pytest.approx((3 + 0 + 3 + 1) / 4), "too much and too little do not make up for each other"
    (flat, _) = level_readings(scores, torch.full((4, 4), 0.3), CONFIG, 0.5)
    assert flat.correlation is None


def test_guesses_count_as_settled_where_they_do_in_training() -> None:
    """One token in fifty may still change."""
    for n_tokens, left in ((50, 0), (49, 1)):
        guesses = [[1] * n_tokens, [2] + [1] * (n_tokens - 1)]
        (found,) = level_readings(measured(guesses, [0] * n_tokens), torch.zeros(2, 1), CONFIG, 0.5)
        assert found.left == left


def test_one_pass_says_nothing_about_passes_left() -> None:
    assert not list(level_readings(measured([[1, 2]], [0, 1]), torch.rand(1, 2), CONFIG, 0.5))


def test_a_line_a_reading() -> None:
    text = format_levels([LevelReading(0.3, 1, 3.654, 4.99, 1.96, 0.331), LevelReading(0.5, 2, 2, 2, 0, None)])
    assert text.splitlines()[-2:] == [
        "   0.3      1     3.65     4.99     1.96         0.33",
        "   0.5      2     2.00     2.00     0.00            -",
    ]
