"""`python -m training.compare A.json B.json`: evaluations of several models as Markdown tables and one picture.

The files are those of `python -m training.evaluate --output`, on the same text with the same masks; of one model there
may be several. With `--against MODEL KIND:SETTING` the tables hold differences from that model's method, segment by
segment, with paired 95 % intervals; that takes the `.npz` beside each `.json`, too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from training.config import ConfigError
from training.evaluation import tallies
from training.evaluation.measures import resamples
from training.evaluation.results import Row
from training.files import write_whole
from training.options import path_named
from training.report import MEASURES, Measure, number, plot_lines, print_text
from training.stopping import command

DEFAULT_MEASURES = ("exact_match", "run_2", "bleu", "passes", "flops_per_token")
SAME = ("masks", "segments", "length", "seed", "precision", "scorer", "round_depth", "settle_depth")
"""What has to be equal in compared files. What a file does not say, or has no figures of, is not compared."""

ROUNDING = 1e-5


@dataclass(frozen=True)
class EvaluationFile:
    """A model, what it restored, and how well: one file, or several of one model."""

    name: str
    digest: str
    of: dict[str, Any]
    rows: list[Row]
    paths: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> EvaluationFile:
        """Raises `ConfigError` for a file that is no evaluation."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(Row)}
            rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in values["rows"]]
            if not all(map(_is_typed, rows)):
                raise TypeError("a row has text for a number, or no number where there has to be one")
            of = {name: values.get(name) for name in SAME} | _plan_of(values, {row.kind for row in rows})
            return cls(str(values["model"]), str(values["digest"]), of, rows, (path,))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path}: no evaluation.json of training.evaluate") from error

    @property
    def model(self) -> tuple[str, str]:
        return self.name, self.digest

    def joined(self, other: EvaluationFile) -> EvaluationFile:
        """With the rows of another file of the model, and figures that are in that file alone.

        Raises `ConfigError` where the two tell different figures.
        """
        rows = {row.key: row for row in self.rows}
        for row in other.rows:
            joined = _joined(rows.get(row.key, row), row)
            if joined is None:
                raise ConfigError(f"{other.paths[0]}: other figures of {row.key} than {self.paths[0]}, for one model")
            rows[row.key] = joined
        return replace(self, rows=list(rows.values()), paths=self.paths + other.paths)


def _joined(row: Row, other: Row) -> Row | None:
    """A row with the figures that only the other one of its key has; None where both have one, and not the same."""
    alone: dict[str, Any] = {}
    for name in (field.name for field in fields(Row) if field.name != "kind"):
        value, theirs = getattr(row, name), getattr(other, name)
        if value is None:
            alone[name] = theirs
        elif theirs is not None and not _is_close(value, theirs):
            return None
    return replace(row, **alone)


def _is_close(one: float, other: float) -> bool:
    """Whether figures are the same but for rounding, of another processor or in tallies, which are kept in float32."""
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING)


def _is_typed(row: Row) -> bool:
    numbers = ((getattr(row, field.name), field.default) for field in fields(Row) if field.name != "kind")
    return isinstance(row.kind, str) and all(
        _is_number(value) or (value is None and default is None) for value, default in numbers
    )


def _is_number(value: object) -> bool:
    """Whether it is one, and not an integer beyond what a float can be."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)


def _plan_of(values: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
    """What rows do not say of themselves: the scorer, the passes of a round, and the pace of settling."""
    plan, scorer = values.get("plan") or {}, values.get("scorer") or {}
    rounds = kinds & {"mask-predict", "ancestral", "ancestral-greedy"}
    return {
        "scorer": scorer.get("digest"),
        "round_depth": plan.get("round_depth") if rounds else None,
        "settle_depth": plan.get("max_depth") if "settle-gate" in kinds else None,
    }


def read_all(paths: Sequence[Path]) -> dict[str, EvaluationFile]:
    """The evaluation of each model, by its name; models of one name are told apart by their digest."""
    found = [EvaluationFile.read(path) for path in paths]
    for name in SAME:
        told = [one for one in found if one.of[name] is not None]
        for one in told[1:]:
            if one.of[name] != told[0].of[name]:
                wanted = "the same text, segments, length, seed, precision, scorer and depths of rounds"
                raise ConfigError(f"{one.paths[0]}: other {name} than {told[0].paths[0]}: want {wanted}")
    models: dict[tuple[str, str], EvaluationFile] = {}
    for one in found:
        models[one.model] = models[one.model].joined(one) if one.model in models else one
    names = [name for name, _ in models]
    return {name if names.count(name) == 1 else f"{name}@{digest[:8]}": one for (name, digest), one in models.items()}


def chosen(rows: Sequence[Row], only: Sequence[str], mask_ratios: Sequence[float]) -> list[Row]:
    """The rows whose `kind` or `kind:setting` is among `only`, at the given mask ratios; an empty list is all."""
    return [
        row
        for row in rows
        if (not only or row.kind in only or f"{row.kind}:{row.setting:g}" in only)
        and (not mask_ratios or row.mask_ratio in mask_ratios)
    ]


def check_choice(rows: Sequence[Row], only: Sequence[str], mask_ratios: Sequence[float]) -> None:
    """Raise `ConfigError` for a method or a mask ratio that is not among the rows of all evaluations."""
    for method in only:
        if not chosen(rows, [method], []):
            kinds = ", ".join(dict.fromkeys(row.kind for row in rows))
            raise ConfigError(f"--only {method}: no evaluation has it, want KIND or KIND:SETTING of {kinds}")
    for ratio in mask_ratios:
        if not chosen(rows, [], [ratio]):
            there = ", ".join(f"{there:g}" for there in sorted({row.mask_ratio for row in rows}))
            raise ConfigError(f"--mask-ratios {ratio:g}: no evaluation has it, want of {there}")


class Against:
    """A method of one model that all others are compared with, on the same segments."""

    def __init__(self, models: dict[str, EvaluationFile], model: str, method: str) -> None:
        """Raises `ConfigError` where there is no such model or method, or no tallies."""
        if model not in models:
            raise ConfigError(f"--against {model}: want one of {', '.join(models)}")
        self.name = f"{model}, {method.replace(':', ' ')}"
        self.rows = {row.mask_ratio: row for row in models[model].rows if f"{row.kind}:{row.setting:g}" == method}
        if not self.rows:
            raise ConfigError(f"--against {model} {method}: it has no such method; want KIND:SETTING, as fixed:1")
        self.model = model
        self.tallies = {label: _tallies_of(one) for label, one in models.items()}
        self.weights: Tensor | None = None

    def cell(self, measure: Measure, model: str, row: Row) -> str:
        """`+difference ± half of the paired interval`, without the latter for what is not counted by segment."""
        other = self.rows.get(row.mask_ratio)
        own, theirs = (None, None) if other is None else (measure.value(row), measure.value(other))
        if other is None or own is None or theirs is None:
            return "-"
        tally, base = self._tally(model, row, measure), self._tally(self.model, other, measure)
        if tally is None or base is None:
            return f"{own - theirs:+.2f}"
        if self.weights is None:
            self.weights = resamples(tally.shape[1], seed=0)
        found = tallies.paired(tally, base, self.weights)
        return f"{found.value / measure.unit:+.2f} ± {found.interval / measure.unit:.2f}"

    def _tally(self, model: str, row: Row, measure: Measure) -> Tensor | None:
        if row.key not in self.tallies[model]:
            raise ConfigError(f"{model}: its .npz lacks {row.key}, so it is of another evaluation")
        return self.tallies[model][row.key].get(measure.field)


def _tallies_of(one: EvaluationFile) -> dict[str, tallies.Tallies]:
    """The tallies beside an evaluation. Raises `ConfigError` unless they add up to its rows, and so belong to it."""
    paths = [path.with_suffix(".npz") for path in one.paths]
    found: dict[str, tallies.Tallies] = {}
    for path in reversed(paths):  # of what is in two, that of the first
        for key, own in tallies.read(path).items():
            found[key] = found.get(key, {}) | own
    for row in one.rows:
        for name, tally in found.get(row.key, {}).items():
            said, counted = getattr(row, name, None), tallies.total(tally)
            if said is None or not _is_close(said, counted):
                raise ConfigError(
                    f"{paths[0]}: of another evaluation than {one.paths[0].name}: {name} of {row.key} is {counted:.6g} "
                    f"by it, {said} in the table; evaluate anew with --output"
                )
    return found


def markdown(models: dict[str, list[Row]], measure: Measure, against: Against | None = None) -> str:
    """A table with a line a model and setting and a column a mask ratio, `value ± half of the interval`.

    Raises `ConfigError` where `against` has nothing to compare with.
    """
    ratios = sorted({row.mask_ratio for rows in models.values() for row in rows})
    cells = {
        (model, row.label, row.mask_ratio): _cell(measure, row)
        if against is None
        else against.cell(measure, model, row)
        for model, rows in models.items()
        for row in rows
    }
    over = "" if against is None else f", over {against.name}"
    lines = [
        f"{measure.title[0].upper()}{measure.title[1:]}{over}:",
        "",
        "| model | method |" + "".join(f" {100 * ratio:g} % |" for ratio in ratios),
        "|---|---|" + "---|" * len(ratios),
    ]
    for model, label in dict.fromkeys((model, label) for model, label, _ in cells):
        values = (cells.get((model, label, ratio), "-") for ratio in ratios)
        lines.append(f"| {model} | {label} |" + "".join(f" {value} |" for value in values))
    return "\n".join(lines)


def _cell(measure: Measure, row: Row) -> str:
    half = measure.half(row)
    return number(measure.value(row)) + ("" if half is None else f" ± {half:.2f}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rdt-compare", description="Put evaluations of several models side by side.")
    parser.add_argument("evaluations", nargs="+", type=path_named, metavar="EVALUATION.json")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=DEFAULT_MEASURES)
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND[:SETTING]", help="e.g. fixed:1 gate:0.2 settle")
    parser.add_argument("--mask-ratios", nargs="+", type=float, default=[])
    parser.add_argument(
        "--against", nargs=2, metavar=("MODEL", "KIND:SETTING"), help="show differences from it, with paired intervals"
    )
    parser.add_argument("--plot", type=path_named, help="a .png of quality against compute, a line a model and method")
    options = parser.parse_args(arguments)
    try:
        found = read_all(options.evaluations)
        check_choice([row for one in found.values() for row in one.rows], options.only, options.mask_ratios)
        models = {name: chosen(one.rows, options.only, options.mask_ratios) for name, one in found.items()}
        if not any(models.values()):
            raise ConfigError("no row is left: look at --only and --mask-ratios")
        against = None if options.against is None else Against(found, *options.against)
        text = "\n\n".join(markdown(models, MEASURES[name], against) for name in options.measures)
    except ConfigError as error:
        print(f"rdt-compare: {error}", file=sys.stderr)
        return 2
    status = print_text(text)
    try:
        if options.plot is not None:
            lines = [(f"{name}, {row.kind}", row) for name, rows in models.items() for row in rows]
            write_whole({options.plot: lambda path: plot_lines(lines, path)})
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
        print(f"rdt-compare: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
