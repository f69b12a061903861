"""Compares the level with the truth: the passes that are left until the model's own guesses no longer change.

S: segments   P: passes
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rdt_core.config import ModelConfig
from training.config import TrainingSection
from training.evaluation.restoring import Measured
from training.evaluation.results import LevelReading
from training.losses import passes_left

AFTER = (1, 2, 4)


def level_readings(scores: Measured, levels: Tensor, config: ModelConfig, mask_ratio: float) -> Iterator[LevelReading]:
    """Readings after `AFTER` passes, from the scores and levels `(P, S)` of every depth. The guesses of the deepest
    count as final, as in training, with the default `training.gate_change_share`: a checkpoint does not hold its own.

    Segments without a mask do not count, nor does the last pass, after which nothing is left by definition.
    """
    n_passes, n_segments = levels.shape
    masks = torch.bincount(scores.segments, minlength=n_segments)
    left = passes_left(scores.guesses, scores.segments, n_segments, TrainingSection.gate_change_share)[:, masks > 0]
    said = (levels * config.total_steps)[:, masks > 0]
    for after in (n for n in AFTER if n < n_passes):
        one, other = said[after - 1].double(), left[after - 1].double()
        yield LevelReading(
            mask_ratio,
            after,
            said=one.mean().item(),
            left=other.mean().item(),
            off=(one - other).abs().mean().item(),
            correlation=_correlation(one, other),
        )


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's; None if one of the two is constant."""
    spread = one.std(correction=0) * other.std(correction=0)
    if spread == 0:
        return None
    return (((one - one.mean()) * (other - other.mean())).mean() / spread).item()
