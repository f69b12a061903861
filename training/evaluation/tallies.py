"""What methods got right in each segment, kept so that any two of them can be compared in pairs.

S: segments   B: resamples

A tally is of one measure: hits and counts `(2, S)`, or what BLEU counts `(10, S)`. Two tallies of one measure over the
same masks give a paired difference, also between different models and methods.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import ConfigError
from training.evaluation.measures import Estimate, bleu, half_width, paired_difference, share
from training.evaluation.results import Row

Tallies = dict[str, Tensor]  # of one row, by measure


def estimate(tally: Tensor, weights: Tensor) -> Estimate:
    """A share, or BLEU with its interval over the resamples `weights` `(B, S)`."""
    if len(tally) == 2:
        return share(*tally)
    return Estimate(bleu(tally.sum(1)[None]).item(), half_width(bleu(weights @ tally.T)))


def total(tally: Tensor) -> float:
    """The share or BLEU of all segments, as a row has it; NaN where nothing is counted."""
    return (tally[0].sum() / tally[1].sum() if len(tally) == 2 else bleu(tally.sum(1)[None])).item()


def paired(tally: Tensor, other: Tensor, weights: Tensor) -> Estimate:
    """How much more `tally` is than `other`, of the same measure over the same masks."""
    if len(tally) == 2:
        return paired_difference(tally[0], other[0], tally[1])
    value = bleu(tally.sum(1)[None]) - bleu(other.sum(1)[None])
    return Estimate(value.item(), half_width(bleu(weights @ tally.T) - bleu(weights @ other.T)))


def write(path: Path, rows: Sequence[Row], tallies: Sequence[Tallies]) -> None:
    """Into one `.npz`: an array a measure and row."""
    arrays = {
        f"{row.key}/{measure}": tally.numpy().astype(np.float32)
        for row, found in zip(rows, tallies, strict=True)
        for measure, tally in found.items()
    }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read(path: Path) -> dict[str, Tallies]:
    """The tallies of each row, by `Row.key`. Raises `ConfigError`."""
    found: dict[str, Tallies] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                key, _, measure = name.rpartition("/")
                found.setdefault(key, {})[measure] = torch.from_numpy(arrays[name]).double()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there, but --against needs it; evaluate anew with --output") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: no tallies of training.evaluate") from error
    return found
