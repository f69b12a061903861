from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rdt_core import Tokenizer
from training.config import ConfigError
from training.evaluation import tallies
from training.evaluation.measures import BleuCounter, paired_difference, resamples, share
from training.evaluation.results import Row

ROWS = [
    Row("fixed", 1, ratio, exact_match=0.5, interval=0.1, bits=1, passes=1, flops_per_token=1) for ratio in (0.2, 0.5)
]


def shares(seed: int) -> Tensor:
    """Hits and counts of 40 segments `(2, 40)`."""
    hits = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(seed))
    return torch.stack((hits.double(), torch.full((40,), 10.0).double()))


def test_a_difference_is_that_of_the_shares_with_its_paired_interval() -> None:
    ours, theirs = shares(0), shares(1)
    found = tallies.paired(ours, theirs, resamples(40, seed=0))
    assert found == paired_difference(ours[0], theirs[0], ours[1])
    assert found.value == pytest.approx((ours[0].sum() - theirs[0].sum()).item() / 400)


def test_a_share_is_estimated_as_one() -> None:
    assert tallies.estimate(shares(0), resamples(40, seed=0)) == share(*shares(0))


def test_a_method_differs_from_itself_by_nothing(tiny_tokenizer: Tokenizer) -> None:
    texts = torch.randint(5, 40, (8, 20), generator=torch.Generator().manual_seed(0))
    weights = resamples(8, seed=0)
    counts = BleuCounter(tiny_tokenizer, texts).of(texts.flip(1))
    assert tallies.paired(counts, counts, weights) == (0, 0)
    assert tallies.paired(shares(0), shares(0), weights) == (0, 0)


def test_bleu_differs_by_what_the_resamples_say(tiny_tokenizer: Tokenizer) -> None:
    """Texts with more and more errors: far apart, with an interval smaller than either's own."""
    generator = torch.Generator().manual_seed(0)
    originals, other = torch.randint(5, 40, (2, 30, 24), generator=generator)
    wrong = torch.rand(originals.shape, generator=generator) < torch.linspace(0, 0.6, 30)[:, None]
    worse = torch.where(wrong, other, originals)
    better = torch.where(wrong & (torch.arange(24) % 4 > 0), other, originals)
    counter, weights = BleuCounter(tiny_tokenizer, originals), resamples(30, seed=0)
    own, base = (tallies.estimate(counter.of(text), weights) for text in (better, worse))
    found = tallies.paired(counter.of(better), counter.of(worse), weights)
    assert found.value == pytest.approx(own.value - base.value)
    assert 0 < found.interval < min(own.interval, base.interval)
    assert found.interval < math.hypot(own.interval, base.interval) / 2


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kept = [{"exact_match": shares(0), "bleu": torch.ones(10, 40).double()}, {"exact_match": shares(1)}]
    tallies.write(tmp_path / "evaluation.npz", ROWS, kept)
    found = tallies.read(tmp_path / "evaluation.npz")
    assert list(found) == ["fixed:1@0.2", "fixed:1@0.5"]
    for row, own in zip(ROWS, kept, strict=True):
        assert found[row.key].keys() == own.keys()
        assert all(torch.equal(found[row.key][name], tally) for name, tally in own.items())


def test_a_file_of_something_else_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.npz: not there, but --against needs it"):
        tallies.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"text.npz: no tallies of training.evaluate"):
        tallies.read(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", **{"fixed:1@0.2/bits": np.array([{}], dtype=object)})
    with pytest.raises(ConfigError, match=r"pickled.npz: no tallies"):
        tallies.read(tmp_path / "pickled.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ConfigError, match=r"array.npz: no tallies"):
        tallies.read(tmp_path / "array.npz")
