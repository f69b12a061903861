"""`python -m training.sudoku --output FOLDER`: Sudoku grids as text, one a line, and their tokenizer.

A grid with gaps is a text whose gaps depend on one another: each must be found from those before it, so one text needs
many passes and another few. On such text the gate can be tried, and recursion, where they should show.

Grids are completed by random search, so any of them may come, though not all equally often. The three files have no
grid in common.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from rdt_core.tokenizer import SPECIAL_TOKENS
from training.config import ConfigError
from training.files import make_folder, write_whole
from training.options import path_named
from training.stopping import command

BOXES = {"2x3": (2, 3), "3x3": (3, 3)}
MOST_GRIDS = 1_000_000
"""Of a file, so that all of them fit into memory. With boxes of 2x3 there are 28 million grids."""


def completions(givens: Sequence[int], height: int, width: int, rng: random.Random) -> Iterator[list[int]]:
    """Every completed grid with these cells, row after row, 0 for an empty one; in random order.

    Of boxes with `height x width` cells. 1 to `height * width` is once in every row, column and box.
    """
    side = height * width
    cells, left = list(givens), [place for place, digit in enumerate(givens) if digit == 0]
    rows, columns = ([place // side for place in range(side**2)], [place % side for place in range(side**2)])
    boxes = [row // height * height + column // width for row, column in zip(rows, columns, strict=True)]
    units = list(zip(rows, (side + column for column in columns), (2 * side + box for box in boxes), strict=True))
    used = [0] * (3 * side)  # of each row, column and box, the digits that it has, as bits
    for place, digit in enumerate(givens):
        if digit:
            for unit in units[place]:
                used[unit] |= 1 << digit

    def choices(place: int) -> int:
        row, column, box = units[place]
        return ~(used[row] | used[column] | used[box]) & (2 << side) - 2

    def complete() -> Iterator[list[int]]:
        if not left:
            yield cells.copy()
            return
        next_one = min(range(len(left)), key=lambda i: choices(left[i]).bit_count())
        place = left.pop(next_one)
        digits = [digit for digit in range(1, side + 1) if choices(place) >> digit & 1]
        for digit in rng.sample(digits, len(digits)):
            cells[place] = digit
            for unit in units[place]:
                used[unit] ^= 1 << digit
            yield from complete()
            for unit in units[place]:
                used[unit] ^= 1 << digit
        left.insert(next_one, place)

    rng.shuffle(left)
    return complete()


def random_grids(height: int, width: int, seed: int) -> Iterator[str]:
    """Different grids as lines of text, without end."""
    rng, seen = random.Random(seed), set()
    while True:
        line = " ".join(map(str, next(completions([0] * (height * width) ** 2, height, width, rng))))
        if line not in seen:
            seen.add(line)
            yield line


def write_lines(lines: Iterator[str], n: int, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(next(lines) + "\n" for _ in range(n))


def write_tokenizer(side: int, path: Path) -> None:
    """Whole numbers as words, and BERT's special tokens."""
    words = [*SPECIAL_TOKENS, *map(str, range(1, side + 1))]
    BertWordPieceTokenizer({word: number for number, word in enumerate(words)}).save(str(path))


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.sudoku", description="Write Sudoku grids as text.")
    parser.add_argument("--output", required=True, type=path_named, help="the folder to write in")
    parser.add_argument("--box", choices=BOXES, default="2x3", help="rows and columns of a box (default: %(default)s)")
    parser.add_argument("--grids", type=int, default=300_000, help="to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=2000, help="to validate, and to test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    height, width = BOXES[options.box]
    lines = random_grids(height, width, options.seed)
    sizes = {"train.txt": options.grids, "valid.txt": options.held_out, "test.txt": options.held_out}
    try:
        for option, n in (("--grids", options.grids), ("--held-out", options.held_out)):
            if not 1 <= n <= MOST_GRIDS:
                raise ConfigError(f"{option} is {n}: want 1 to {MOST_GRIDS}")
        make_folder(options.output, "--output")
        for name, n in sizes.items():
            write_whole({options.output / name: partial(write_lines, lines, n)})
        write_whole({options.output / "tokenizer.json": partial(write_tokenizer, height * width)})
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
