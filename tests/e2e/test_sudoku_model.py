"""The weights for Sudoku, on which passes pay."""

from __future__ import annotations

import random
import re
import statistics
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rdt_core import LoadedModel, checkpoint, restore
from service.local import LocalDenoiser
from training.sudoku import completions, random_grids

FILE = Path(__file__).parents[2] / "models" / "rdt-sudoku" / "best_model.pt"
HEIGHT, WIDTH = 2, 3

pytestmark = pytest.mark.e2e


class Puzzle(NamedTuple):
    grid: list[int]
    text: str


@pytest.fixture(scope="module")
def sudoku() -> LoadedModel:
    return checkpoint.load(FILE)


def puzzles(n_gaps: int, n: int = 20) -> list[Puzzle]:
    """With one solution each, as lines of a grid. The seed is not that of the training text."""
    rng, found = random.Random(1), []
    for line in random_grids(HEIGHT, WIDTH, seed=2026):
        grid = [int(digit) for digit in line.split()]
        gaps = set(rng.sample(range(len(grid)), n_gaps))
        givens = [0 if place in gaps else digit for place, digit in enumerate(grid)]
        if len(list(islice(completions(givens, HEIGHT, WIDTH, rng), 2))) == 1:
            cells = [str(digit) if digit else "[MASK]" for digit in givens]
            side = HEIGHT * WIDTH
            rows = [" ".join(cells[start : start + side]) for start in range(0, side**2, side)]
            found.append(Puzzle(grid, "\n".join(rows)))
        if len(found) == n:
            break
    return found


def solved(sudoku: LoadedModel, puzzle: Puzzle, **options: Any) -> tuple[bool, int]:
    """Whether the grid is right throughout, and after how many passes."""
    text = sudoku.tokenizer.encode(puzzle.text)
    found = restore(sudoku.model, torch.tensor(text.ids), torch.tensor(text.masked), **options)
    written = sudoku.tokenizer.write(text, {row: found.tokens[row] for row in found.rows})
    assert written.count("\n") == HEIGHT * WIDTH - 1, "rows stay rows"
    return [int(digit) for digit in written.split()] == puzzle.grid, found.steps


def test_its_card_shows_what_it_answers() -> None:
    card = (FILE.parent / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r'--text "(.*)"', card)
    (shown,) = re.findall(r"^Output: (.*\nSteps: .*)$", card, flags=re.MULTILINE)
    answer = LocalDenoiser(FILE, "cpu").denoise(text)
    assert f"{answer.text}\nSteps: {answer.steps}/{answer.max_steps}" == shown


def test_half_of_a_grid_takes_passes_and_is_solved_by_them(sudoku: LoadedModel) -> None:
    half_empty = puzzles(n_gaps=18)
    assert sum(solved(sudoku, puzzle)[0] for puzzle in half_empty) >= 18
    assert sum(solved(sudoku, puzzle, max_steps=1)[0] for puzzle in half_empty) <= 4


def test_the_gate_gives_hard_grids_more_passes(sudoku: LoadedModel) -> None:
    options = {"max_steps": 16, "threshold": 0.002}
    easy, hard = ([solved(sudoku, puzzle, **options)[1] for puzzle in puzzles(n_gaps)] for n_gaps in (6, 18))
    assert statistics.mean(easy) + 1 < statistics.mean(hard)
    assert len(set(hard)) > 2, "nor do all hard ones get the same"
