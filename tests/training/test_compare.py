from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import compare, evaluate
from training.compare import Against, main, read_all

ROW = {"exact_match": 0.25, "interval": 0.011, "bits": 5.0, "passes": 2.0, "flops_per_token": 3e6, "bleu": 61.2,
       "bleu_interval": 0.4}  # fmt: skip


def row(kind: str, setting: float, ratio: float, **changes: Any) -> dict[str, Any]:
    return {"kind": kind, "setting": setting, "mask_ratio": ratio, **ROW, **changes}


def write(path: Path, model: str, digest: str, rows: list[dict[str, Any]], **changes: Any) -> str:
    summary: dict[str, Any] = {
        "model": model,
        "digest": digest,
        "segments": 3,
        "length": 12,
        "seed": 0,
        "masks": "abc",
        "rows": rows,
    }
    path.write_text(json.dumps(summary | changes), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    ours = [row("fixed", 1, 0.15), row("gate", 0.2, 0.15, exact_match=0.5), row("gate", 0.2, 0.5, run_2=0.1)]
    theirs = [row("mask-predict", 10, 0.15, exact_match=0.125)]
    return [write(tmp_path / "a.json", "ours", "1" * 64, ours), write(tmp_path / "b.json", "theirs", "2" * 64, theirs)]


def test_a_line_a_model_and_setting_and_a_column_a_ratio(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--measures", "exact_match", "run_2"]) == 0
    exact, runs = capsys.readouterr().out.strip().split("\n\nRuns of 2")
    assert exact.splitlines() == [
        "Exact match, % of masked tokens:",
        "",
        "| model | method | 15 % | 50 % |",
        "|---|---|---|---|",
        "| ours | fixed 1 | 25.00 ± 1.10 | - |",
        "| ours | gate 0.2 | 50.00 ± 1.10 | 25.00 ± 1.10 |",
        "| theirs | mask-predict 10 | 12.50 ± 1.10 | - |",
    ]
    assert "| ours | gate 0.2 | - | 10.00 |" in runs


def test_some_methods_and_ratios(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--only", "gate:0.2", "mask-predict", "--mask-ratios", "0.15", "--measures", "passes"]
    assert main([*files, *chosen]) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [
        "| ours | gate 0.2 | 2.00 |",
        "| theirs | mask-predict 10 | 2.00 |",
    ]


def test_the_picture(files: list[str], tmp_path: Path) -> None:
    assert main([*files, "--plot", str(tmp_path / "all.png")]) == 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_one_name_are_told_apart(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = write(tmp_path / "c.json", "ours", "3" * 64, [row("fixed", 1, 0.15)])
    assert main([files[0], again, "--measures", "passes"]) == 0
    printed = capsys.readouterr().out
    assert "| ours@11111111 | fixed 1 |" in printed
    assert "| ours@33333333 | fixed 1 |" in printed


def test_an_evaluation_from_before_the_new_measures_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {name: value for name, value in row("fixed", 1, 0.15).items() if not name.startswith("bleu")}
    assert main([write(tmp_path / "a.json", "old", "1" * 64, [old], masks=None)]) == 0
    assert "| old | fixed 1 | - |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"masks": "other"}, "other masks than"),
        ({"masks": None, "segments": 9}, "other segments than"),
        (
            {"model": "ours", "digest": "1" * 64, "rows": [row("fixed", 1, 0.15, bits=4.0)]},
            "c.json: other figures of fixed:1@0.15 than ",
        ),
        ({"rows": [{"kind": "fixed"}]}, "no evaluation.json"),
        ({"rows": [row("fixed", 1, 0.15, passes="two")]}, "no evaluation.json"),
        ({"rows": [row("fixed", 1, 0.15, bits=None)]}, "no evaluation.json"),
        ({"rows": [row(1, 1, 0.15)]}, "no evaluation.json"),  # type: ignore[arg-type]
        ({"rows": [row("fixed", 10**400, 0.15)]}, "no evaluation.json"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    files: list[str], tmp_path: Path, changes: dict[str, Any], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": "c", "digest": "4" * 64, "rows": [row("fixed", 1, 0.15)]} | changes
    other = write(tmp_path / "c.json", **values)
    assert main([files[0], other]) == 2
    printed = capsys.readouterr().err
    assert problem in printed
    assert printed.count("\n") == 1


def test_several_files_of_one_model_are_one_evaluation(files: list[str], tmp_path: Path) -> None:
    more = write(tmp_path / "c.json", "ours", "1" * 64, [row("fixed", 1, 0.15), row("settle", 3, 0.15)])
    found = read_all([*map(Path, files), Path(more)])
    assert [one.key for one in found["ours"].rows] == ["fixed:1@0.15", "gate:0.2@0.15", "gate:0.2@0.5", "settle:3@0.15"]
    assert list(found) == ["ours", "theirs"]


def test_figures_that_differ_by_rounding_or_are_in_one_file_alone_are_joined(files: list[str], tmp_path: Path) -> None:
    """As of another processor, or of an evaluation with a scorer."""
    again = row("fixed", 1, 0.15, bits=5.0 * (1 + 1e-7), lm_bits=7.0)
    more = write(tmp_path / "c.json", "ours", "1" * 64, [again], scorer={"digest": "a"})
    found = read_all([*map(Path, files), Path(more)])["ours"].rows[0]
    assert (found.bits, found.lm_bits, found.run_2) == (5.0, 7.0, None)


def test_tallies_of_one_file_alone_are_joined(
    evaluated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(Path(evaluated[0]).with_suffix(".npz")) as arrays:
        kept = {name: arrays[name] for name in arrays.files if not name.endswith("/bits")}
    first = tmp_path / "first.npz"
    np.savez(first, **kept)
    shutil.copy(evaluated[0], first.with_suffix(".json"))
    joined = [str(first.with_suffix(".json")), *evaluated]
    assert main([*joined, "--against", "ours", "fixed:1", "--only", "fixed:2", "--measures", "bits"]) == 0
    assert " ± " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', "[" * 100_000])
def test_a_file_that_is_no_evaluation(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "x.json")]) == 2
    assert "no evaluation.json" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"scorer": {"digest": "b"}}, "scorer"),
        ({"plan": {"round_depth": 2}}, "round_depth"),
        ({"plan": {"max_depth": 6}}, "settle_depth"),
    ],
)
def test_rows_that_mean_other_things_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("mask-predict", 2, 0.15), row("settle-gate", 0.2, 0.15)]
    known = {"scorer": {"digest": "a"}, "plan": {"round_depth": 1, "max_depth": 3}}
    silent = write(tmp_path / "silent.json", "silent", "9" * 64, [row("fixed", 1, 0.15)])  # as to what differs
    one = write(tmp_path / "one.json", "one", "1" * 64, rows, **known)
    same = write(tmp_path / "same.json", "same", "2" * 64, rows, **known)
    other = write(tmp_path / "other.json", "other", "3" * 64, rows, **(known | changes))
    fixed = write(tmp_path / "fixed.json", "fixed", "4" * 64, [row("fixed", 1, 0.15)], plan={"max_depth": 9})
    assert main([one, same, fixed]) == 0
    capsys.readouterr()
    for evaluations in ([one, other], [silent, one, other]):
        assert main(evaluations) == 2
        assert f"other {name} than" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compare, "plot_lines", half)
    (tmp_path / "all.png").write_bytes(b"old")
    assert main([*files, "--plot", str(tmp_path / "all.png")]) == 2
    assert f"{tmp_path / 'all.png'}: cannot be written: [Errno 28]" in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir() if "png" in file.name] == [b"old"]


def test_a_picture_that_cannot_be_written_costs_no_table(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, "--plot", str(tmp_path / "nowhere" / "all.png")]) == 2
    printed = capsys.readouterr()
    assert "| ours | fixed 1 |" in printed.out
    assert printed.err.startswith(f"rdt-compare: {tmp_path / 'nowhere' / 'all.png'}: cannot be written: [Errno 2]")


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (["--only", "magic"], "--only magic: no evaluation has it, want KIND or KIND:SETTING of "),
        (["--only", "fixed", "gate:0.3"], "--only gate:0.3: no evaluation has it, "),
        (["--only", "fixed", "mask-predict"], None),
        (["--mask-ratios", "0.15", "0.2"], "--mask-ratios 0.2: no evaluation has it, want of 0.15, 0.5\n"),
        (["--only", "fixed", "--mask-ratios", "0.5"], "no row is left: look at --only and --mask-ratios\n"),
    ],
)
def test_what_is_asked_for_is_there(
    files: list[str], choice: list[str], problem: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *choice]) == (0 if problem is None else 2)
    printed = capsys.readouterr().err
    assert printed.startswith("" if problem is None else f"rdt-compare: {problem}")
    assert printed.count("\n") == (problem is not None)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text_file: Path) -> list[str]:
    """What evaluates the small model, but for its depths and the output."""
    arguments = ["--checkpoint", str(tiny_checkpoint), "--text", str(text_file)]
    arguments += ["--cache-dir", str(tmp_path_factory.mktemp("cache"))]
    arguments += ["--length", "12", "--segments", "5", "--mask-ratios", "0.5", "--thresholds", "--unchanged"]
    return [*arguments, "--mask-predict", "2", "--settle-passes", "--settle-thresholds", "--ancestral"]


@pytest.fixture(scope="module")
def evaluations(again: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of one model under two names, of depths and rounds."""
    folder = tmp_path_factory.mktemp("evaluations")
    for name, depth in (("ours", "2"), ("theirs", "1")):
        assert evaluate.main([*again, "--max-depth", depth, "--output", str(folder / name)]) == 0
        file = folder / name / "evaluation.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(values | {"model": name}), encoding="utf-8")
    return folder


@pytest.fixture
def evaluated(evaluations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Files of them that a test may change."""
    capsys.readouterr()
    shutil.copytree(evaluations, tmp_path / "evaluations")
    return [str(tmp_path / "evaluations" / name / "evaluation.json") for name in ("ours", "theirs")]


def test_differences_from_one_method_are_in_pairs(evaluated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*evaluated, "--against", "ours", "fixed:1", "--measures", "exact_match", "bleu", "passes"]) == 0
    exact, bleu, passes = (part.splitlines() for part in split_tables(capsys.readouterr().out))
    assert exact[0] == "Exact match, % of masked tokens, over ours, fixed 1:"
    assert bleu[0] == "BLEU-4 of whole segments, over ours, fixed 1:"
    for table in (exact, bleu):
        assert "| theirs | fixed 1 | +0.00 ± 0.00 |" in table  # the same model, so the same guesses
        assert re.fullmatch(r"\| theirs \| mask-predict 2 \| [+-]\d+\.\d\d ± \d+\.\d\d \|", table[-1])
    assert "| ours | fixed 2 | +1.00 |" in passes


def test_a_difference_is_the_difference_of_the_values(evaluated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "mask-predict", "fixed:1", "--measures", "bits"]
    assert main([evaluated[1], *only]) == 0
    values = [float(line.split("|")[3].split("±")[0]) for line in capsys.readouterr().out.splitlines()[4:]]
    assert main([evaluated[1], *only, "--against", "theirs", "fixed:1"]) == 0
    differences = [float(line.split("|")[3].split("±")[0]) for line in capsys.readouterr().out.splitlines()[4:]]
    assert differences == pytest.approx([value - values[0] for value in values], abs=0.011)


@pytest.mark.parametrize(
    ("against", "problem"),
    [
        (["nobody", "fixed:1"], "--against nobody: want one of ours, theirs"),
        (["theirs", "fixed:2"], "--against theirs fixed:2: it has no such method; want KIND:SETTING, as fixed:1"),
        (["theirs", "fixed"], "--against theirs fixed: it has no such method; want KIND:SETTING, as fixed:1"),
    ],
)
def test_an_against_that_is_not_there(
    evaluated: list[str], against: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*evaluated, "--against", *against]) == 2
    assert capsys.readouterr().err == f"rdt-compare: {problem}\n"


def test_tallies_of_another_evaluation(evaluated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(Path(evaluated[1]).with_suffix(".npz"), Path(evaluated[0]).with_suffix(".npz"))
    assert main([*evaluated, "--against", "theirs", "fixed:1"]) == 2
    assert "ours: its .npz lacks fixed:2@0.5" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [["--seed", "1"], ["--segments", "4"]])
def test_tallies_of_other_masks_or_segments(
    evaluated: list[str], again: list[str], changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows have the same names: only what they add up to tells."""
    other = Path(evaluated[0]).parents[1] / "other"
    assert evaluate.main([*again, "--max-depth", "2", *changes, "--output", str(other)]) == 0
    capsys.readouterr()
    shutil.copy(other / "evaluation.npz", Path(evaluated[0]).with_suffix(".npz"))
    assert main([*evaluated, "--against", "theirs", "fixed:1"]) == 2
    assert "evaluation.npz: of another evaluation than evaluation.json: " in capsys.readouterr().err


def test_evaluations_that_earlier_code_has_kept_can_be_compared() -> None:
    kept = Path(__file__).parents[2] / "models" / "rdt-small" / "evaluation" / "branches"
    models = read_all(sorted(kept.glob("*.json")))
    against = Against(models, next(iter(models)), "fixed:1")
    assert all(against.tallies[name].keys() == {row.key for row in one.rows} for name, one in models.items())


def split_tables(printed: str) -> list[str]:
    return re.split(r"\n\n(?!\|)", printed.strip())


def test_other_number_formats_are_not_compared(evaluated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(evaluated[1])
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"precision": "bf16"}), encoding="utf-8")
    assert main(evaluated) == 2
    assert "other precision than" in capsys.readouterr().err
