"""The figures of an evaluation as text and as a picture."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.results import Comparison, LevelReading, Row

SHOWN_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PLOTTED_RATIOS = 3


@dataclass(frozen=True)
class Measure:
    """A column of `Row`, as people read it."""

    title: str
    field: str
    interval: str | None = None  # the field with its interval
    unit: float = 1.0

    def value(self, row: Row) -> float | None:
        found: float | None = getattr(row, self.field)
        return None if found is None else found / self.unit

    def half(self, row: Row) -> float | None:
        found: float | None = None if self.interval is None else getattr(row, self.interval)
        return None if found is None else found / self.unit


MEASURES = {
    measure.field: measure
    for measure in (
        Measure("exact match, % of masked tokens", "exact_match", "interval", 0.01),
        Measure("runs of 2 masked tokens right throughout, %", "run_2", "run_2_interval", 0.01),
        Measure("runs of 3 masked tokens right throughout, %", "run_3", "run_3_interval", 0.01),
        Measure("runs of 4 masked tokens right throughout, %", "run_4", "run_4_interval", 0.01),
        Measure("segments restored without an error, %", "whole", "whole_interval", 0.01),
        Measure("BLEU-4 of whole segments", "bleu", "bleu_interval"),
        Measure("bits a masked token", "bits", "bits_interval"),
        Measure("bits a restored token under the left-to-right model", "lm_bits", "lm_bits_interval"),
        Measure(
            "bits of the whole text over the original's under that model, a restored token",
            "lm_excess_bits",
            "lm_excess_bits_interval",
        ),
        Measure("mean passes", "passes"),
        Measure("MFLOPs a token", "flops_per_token", unit=1e6),
    )
}
PLOTTED = ("exact_match", "run_2", "bleu")


def format_table(rows: Sequence[Row]) -> str:
    """A block for each measure, with a line for each setting and a column for each mask ratio. Of many fixed depths,
    only some are shown.
    """
    ratios = sorted({row.mask_ratio for row in rows})
    deepest = max((row.setting for row in rows if row.kind == "fixed"), default=0)
    shown = [row for row in rows if row.kind != "fixed" or row.setting in (*SHOWN_DEPTHS, deepest)]
    settings = list(dict.fromkeys((row.kind, row.setting) for row in shown))
    cells = {(row.kind, row.setting, row.mask_ratio): row for row in shown}
    kind_width = max(len(kind) for kind, _ in settings)
    blocks = []
    for measure in MEASURES.values():
        if all(measure.value(row) is None for row in shown):
            continue
        widest = max((half for row in shown if (half := measure.half(row)) is not None), default=None)
        title = measure.title if widest is None else f"{measure.title}, +-{widest:.2f} at the most"
        lines = [title, " " * (kind_width + 8) + "".join(f"{ratio:>9g}" for ratio in ratios)]
        for kind, setting in settings:
            values = (measure.value(cells[kind, setting, ratio]) for ratio in ratios)
            lines.append(f"{kind:<{kind_width}}{setting:>7g} " + "".join(f"{number(value):>9}" for value in values))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """A line for each lookup: points of exact match at equal passes, and passes saved at equal exact match."""
    lines = [
        "within one mask ratio, on the same segments",
        "*: the best lookup at these passes on validation text, or the only one",
        "points: exact match over the lookup's at equal mean passes, with a paired 95 % interval",
        "saved: passes fewer than the lookup's at equal exact match, with a 95 % bootstrap interval;",
        "       > where the lookup never gets there in some samples, so that more may be saved",
        "",
        f"{'ratio':>6}  {'setting':<17}{'passes':>7}{'MFLOPs':>9}  {'against':<11}{'passes':>7}{'MFLOPs':>9}"
        f"{'points':>9}{'+-':>7}{'saved':>9}  interval",
    ]
    for one in comparisons:
        more = "> " if one.unreached > 0 else ""
        lines.append(
            f"{one.mask_ratio:>6g}  {one.kind + f' {one.setting:g}':<17}{one.passes:>7.2f}"
            f"{one.flops_per_token / 1e6:>9.2f}  {one.against + '*' * one.best:<11}{one.against_passes:>7.2f}"
            f"{one.against_flops_per_token / 1e6:>9.2f}{100 * one.difference:>9.2f}{100 * one.interval:>7.2f}"
            f"{more + f'{one.saved:.2f}':>9}  {one.saved_low:.2f} to {one.saved_high:.2f}"
        )
    return "\n".join(lines)


def format_levels(readings: Sequence[LevelReading]) -> str:
    lines = [
        "passes left until the guesses stay: by the level, and in truth, means over segments",
        "",
        f"{'ratio':>6}{'after':>7}{'said':>9}{'left':>9}{'off':>9}{'correlation':>13}",
    ]
    for one in readings:
        values = f"{one.said:>9.2f}{one.left:>9.2f}{one.off:>9.2f}{number(one.correlation):>13}"
        lines.append(f"{one.mask_ratio:>6g}{one.after:>7}{values}")
    return "\n".join(lines)


def plot_lines(points: Sequence[tuple[str, Row]], path: Path) -> None:
    """Quality against compute: a line for each name, a row of panels for each measure, a column for a few ratios."""
    import matplotlib  # noqa: PLC0415 - heavy, and only for the picture

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    ratios = some(sorted({row.mask_ratio for _, row in points}), PLOTTED_RATIOS)
    measures = [MEASURES[name] for name in PLOTTED if any(getattr(row, name) is not None for _, row in points)]
    names = list(dict.fromkeys(name for name, _ in points))
    compute = [row.flops_per_token / 1e6 for _, row in points]
    size = (1 + 4 * len(ratios), 1 + 3 * len(measures))
    figure, axes = plt.subplots(len(measures), len(ratios), figsize=size, squeeze=False, sharex=True)
    for panels, measure in zip(axes, measures, strict=True):
        for axis, ratio in zip(panels, ratios, strict=True):
            for index, name in enumerate(names):
                line = _line(measure, (row for own, row in points if own == name and row.mask_ratio == ratio))
                style = "o-" if index < 10 else "s--"  # the colours come round again
                axis.errorbar(*line, fmt=style, markersize=3, linewidth=1, color=f"C{index % 10}", label=name)
            axis.set_xscale("log")
            axis.set_xlim(0.8 * min(compute), 1.25 * max(compute))
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(f"{ratio:g} masked", fontsize="small")
        panels[0].set_ylabel(measure.title, fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("MFLOPs a token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, format=path.suffix[1:] or "png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def _line(measure: Measure, rows: Iterable[Row]) -> tuple[list[float], list[float], list[float]]:
    """Compute, quality and its interval of the rows that have it, from little compute to much."""
    known: list[tuple[float, float, float]] = []
    for row in rows:
        value = measure.value(row)
        if value is not None:
            known.append((row.flops_per_token / 1e6, value, measure.half(row) or 0.0))
    known.sort()
    return [x for x, _, _ in known], [y for _, y, _ in known], [half for _, _, half in known]


def some(values: Sequence[Any], n: int) -> list[Any]:
    """`n` of the values, evenly spread from the first to the last."""
    if len(values) <= n:
        return list(values)
    return [values[math.floor(i * (len(values) - 1) / (n - 1) + 0.5)] for i in range(n)]


def print_text(text: str) -> int:
    """Exit status: 0 even if the reader of a pipe, such as `head`, has seen enough and left, 2 on a full disk."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter flushes it once more
        if not isinstance(error, BrokenPipeError):
            print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
            return 2
    return 0
