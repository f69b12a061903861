"""An evaluation as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One setting at one mask ratio."""

    kind: str  # "fixed", "gate" or "settle"
    setting: float  # depth, threshold or passes
    mask_ratio: float
    exact_match: float
    interval: float  # half of the 95 % interval of exact_match
    bits: float
    passes: float
    flops_per_token: float


def format_table(rows: Sequence[Row]) -> str:
    """Blocks for exact match, bits, passes and FLOPs, with a line a setting and a column a mask ratio."""
    ratios = sorted({row.mask_ratio for row in rows})
    settings = list(dict.fromkeys((row.kind, row.setting) for row in rows))
    cells = {(row.kind, row.setting, row.mask_ratio): row for row in rows}
    widest = max(row.interval for row in rows)
    blocks = []
    for title, value in (
        (f"exact match, % of masked tokens, +-{100 * widest:.2f} at the most", lambda row: 100 * row.exact_match),
        ("bits a masked token", lambda row: row.bits),
        ("mean passes", lambda row: row.passes),
        ("MFLOPs a token", lambda row: row.flops_per_token / 1e6),
    ):
        lines = [title, " " * 14 + "".join(f"{ratio:>8g}" for ratio in ratios)]
        for kind, setting in settings:
            values = "".join(f"{value(cells[kind, setting, ratio]):>8.2f}" for ratio in ratios)
            lines.append(f"{kind:<7}{setting:>6g} {values}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Exact match against passes, a line a mask ratio; gates as rings on their ratio's line, settle as crosses."""
    import matplotlib  # noqa: PLC0415 - heavy, and only for the picture

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 6))
    ratios = sorted({row.mask_ratio for row in rows})
    for ratio, colour in zip(ratios, plt.cm.viridis([i / len(ratios) for i in range(len(ratios))]), strict=True):
        for kind, style in (("fixed", "-"), ("gate", "o"), ("settle", "x")):
            points = [
                (row.passes, 100 * row.exact_match) for row in rows if (row.kind, row.mask_ratio) == (kind, ratio)
            ]
            label = f"{ratio:g} masked" if kind == "fixed" else None
            axes.plot(
                [x for x, _ in points], [y for _, y in points], style, color=colour, fillstyle="none", label=label
            )
    axes.set(
        xlabel="passes", ylabel="exact match, % of masked tokens", title="line: fixed depth, ring: gate, cross: settle"
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
