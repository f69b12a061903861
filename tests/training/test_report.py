"""Figures as text and as a picture: what stands where, in which unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.evaluation.results import Comparison, LevelReading, Row
from training.report import format_comparisons, format_levels, format_table, plot_lines, some

ROW = Row("fixed", 1, 0.3, exact_match=0.25, interval=0.01, bits=6.5, passes=1.0, flops_per_token=23.5e6)


def block(table: str, title: str) -> list[str]:
    """The lines of a measure, its title first."""
    (found,) = (lines for part in table.split("\n\n") if (lines := part.split("\n"))[0].startswith(title))
    return found


def test_a_table_has_its_units_its_widest_interval_and_a_dash_for_what_was_not_measured() -> None:
    other = replace(ROW, mask_ratio=0.5, exact_match=0.2, interval=0.02, bleu=33.3, bleu_interval=0.7)
    table = format_table([ROW, other])
    assert block(table, "exact match") == [
        "exact match, % of masked tokens, +-2.00 at the most",
        "                   0.3      0.5",
        "fixed      1     25.00    20.00",
    ]
    assert block(table, "BLEU")[2] == "fixed      1         -    33.30"
    assert block(table, "MFLOPs")[::2] == ["MFLOPs a token", "fixed      1     23.50    23.50"]
    assert block(table, "bits a masked token")[0] == "bits a masked token", "there is no interval to tell"
    assert "runs of 2" not in table, "nobody measured it"


def test_of_many_depths_some_are_shown_and_the_deepest_is() -> None:
    rows = [replace(ROW, setting=depth) for depth in range(1, 12)] + [replace(ROW, kind="gate", setting=0.05)]
    shown = [line.split()[:2] for line in block(format_table(rows), "exact match")[2:]]
    assert shown == [["fixed", str(depth)] for depth in (1, 2, 3, 4, 6, 8, 11)] + [["gate", "0.05"]]


COMPARISON = Comparison(
    mask_ratio=0.5, kind="gate", setting=0.1, against="fixed", best=True, passes=2.5, against_passes=2.25,
    exact_match=0.22, against_exact_match=0.21, difference=0.01, interval=0.004, flops_per_token=40.5e6,
    against_flops_per_token=38.25e6, saved=0.5, saved_low=0.25, saved_high=0.75, unreached=0.0,
)  # fmt: skip


def test_a_comparison_is_in_points_passes_and_megaflops() -> None:
    bounded = replace(COMPARISON, best=False, unreached=0.1)
    first, second = (line.split() for line in format_comparisons([COMPARISON, bounded]).split("\n")[-2:])
    figures = ["2.25", "38.25", "1.00", "0.40"]
    assert first == ["0.5", "gate", "0.1", "2.50", "40.50", "fixed*", *figures, "0.50", "0.25", "to", "0.75"]
    assert second == ["0.5", "gate", "0.1", "2.50", "40.50", "fixed", *figures, ">", "0.50", "0.25", "to", "0.75"]


def test_a_reading_without_a_correlation_has_a_dash() -> None:
    readings = [LevelReading(0.3, 2, 1.5, 2.5, 1.25, 0.125), LevelReading(0.3, 4, 1.0, 2.0, 1.0, None)]
    lines = [line.split() for line in format_levels(readings).split("\n")[-2:]]
    assert lines == [["0.3", "2", "1.50", "2.50", "1.25", "0.12"], ["0.3", "4", "1.00", "2.00", "1.00", "-"]]


@pytest.mark.parametrize(("n", "taken"), [(1, [1]), (3, [1, 5, 9]), (4, [1, 4, 6, 9]), (9, list(range(1, 10)))])
def test_some_are_evenly_spread(n: int, taken: list[int]) -> None:
    values = list(range(1, 10)) if n > 1 else [1]
    assert some(values, n) == taken


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that have been drawn, left open until the test ends."""
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


def test_a_picture_has_a_line_a_name_and_a_panel_a_ratio(figure: list[Any], tmp_path: Path) -> None:
    deep = replace(ROW, setting=4, exact_match=0.75, interval=0.03, flops_per_token=50e6)
    rows = [deep, ROW, replace(ROW, mask_ratio=0.5, exact_match=0.125)]
    points = [("ours", row) for row in rows] + [(f"other {n}", replace(ROW, exact_match=n / 100)) for n in range(10)]
    plot_lines(points, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    first, second = figure[0].axes
    lines = [container.lines[0] for container in first.containers]
    assert lines[0].get_xydata().tolist() == [[23.5, 25.0], [50.0, 75.0]], "from little compute to much"
    bars = first.containers[0].lines[2][0].get_segments()
    assert [bar.tolist() for bar in bars] == [
        [[23.5, pytest.approx(24.0)], [23.5, pytest.approx(26.0)]],
        [[50.0, pytest.approx(72.0)], [50.0, pytest.approx(78.0)]],
    ]
    assert second.containers[0].lines[0].get_xydata().tolist() == [[23.5, 12.5]]
    styles = [(line.get_linestyle(), line.get_marker(), line.get_color()) for line in lines]
    assert styles[0] == ("-", "o", "C0")
    assert styles[10] == ("--", "s", "C0"), "the colours come round again"
    assert len(set(styles)) == len(styles) == 11
    assert first.get_xlim() == pytest.approx((0.8 * 23.5, 1.25 * 50.0))
    assert (first.get_title(), second.get_title(), first.get_xlabel()) == ("0.3 masked", "0.5 masked", "MFLOPs a token")
    assert [text.get_text() for text in figure[0].legends[0].get_texts()] == list(dict.fromkeys(dict(points)))


def test_a_picture_leaves_out_what_nobody_measured(figure: list[Any], tmp_path: Path) -> None:
    plot_lines([("one", ROW), ("two", replace(ROW, bleu=50.0))], tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_ylabel() for axis in figure[0].axes] == [
        "exact match, % of masked tokens",
        "BLEU-4 of whole segments",
    ]
    scored = figure[0].axes[1].containers
    assert [len(container.lines[0].get_xydata()) for container in scored] == [0, 1]
