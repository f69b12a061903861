from __future__ import annotations

import random
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest

from rdt_core import Tokenizer
from training.config_file import load_config
from training.sudoku import BOXES, completions, main, random_grids

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("box", BOXES)
def test_every_digit_is_once_in_every_row_column_and_box(box: str) -> None:
    height, width = BOXES[box]
    side = height * width
    for seed in range(20):
        cells = next(completions([0] * side**2, height, width, random.Random(seed)))
        units: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, digit in enumerate(cells):
            row, column = divmod(place, side)
            units["row", row].append(digit)
            units["column", column].append(digit)
            units["box", row // height * height + column // width].append(digit)
        assert len(units) == 3 * side
        for digits in units.values():
            assert sorted(digits) == list(range(1, side + 1))


def test_all_completions_are_found_and_each_once() -> None:
    """There are 288 grids of 4 x 4 cells, and as many for each digit in the first cell."""
    everything = [tuple(cells) for cells in completions([0] * 16, 2, 2, random.Random(0))]
    assert len(everything) == len(set(everything)) == 288
    some = [tuple(cells) for cells in completions([3] + [0] * 15, 2, 2, random.Random(0))]
    assert sorted(some) == sorted(cells for cells in everything if cells[0] == 3)
    assert list(completions([1, 2, 0, 0, 3, 1, *[0] * 10], 2, 2, random.Random(0))) == []


def test_grids_are_different_and_the_same_for_a_seed() -> None:
    some = list(islice(random_grids(2, 3, seed=1), 500))
    assert len(set(some)) == 500
    assert some == list(islice(random_grids(2, 3, seed=1), 500))
    assert not set(some) & set(islice(random_grids(2, 3, seed=2), 500))


def test_a_grid_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([[1, 2], [1, 2], [2, 1]])
    monkeypatch.setattr("training.sudoku.completions", lambda *_: drawn)
    assert list(islice(random_grids(2, 3, seed=0), 2)) == ["1 2", "2 1"]


def test_the_files_suit_the_configuration(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path), "--grids", "50", "--held-out", "7"]) == 0
    names = ("train.txt", "valid.txt", "test.txt")
    lines = {name: (tmp_path / name).read_text(encoding="utf-8").splitlines() for name in names}
    assert [len(lines[name]) for name in names] == [50, 7, 7]
    assert len(set().union(*lines.values())) == 64
    config = load_config(ROOT / "training" / "configs" / "sudoku.yaml")
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for line in lines["train.txt"]:
        ids = tokenizer.encode(line).ids
        assert len(ids) == config.data.max_seq_length
        assert tokenizer.unk_id not in ids
    assert tokenizer.vocab_size - config.model.gate_shortlist == len(tokenizer.special_ids)
    assert config.data.dataset_name == "runs/sudoku/grids/train.txt"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--grids", "0"], "--grids is 0: want 1 to 1000000"),
        (["--held-out", "1000001"], "--held-out is 1000001: want 1 to 1000000"),
        (["--output", "~/grids"], "--output is '~/grids': ~ does not stand for anything here, want the path in full"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"python -m training.sudoku: {problem}\n"
    assert list(tmp_path.iterdir()) == []
