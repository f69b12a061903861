from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.compare import main

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
        ({"model": "ours", "digest": "1" * 64}, "one model was given twice"),
        ({"rows": [{"kind": "fixed"}]}, "no evaluation.json"),
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}'])
def test_a_file_that_is_no_evaluation(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "x.json")]) == 2
    assert "no evaluation.json" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_nothing_left_to_show(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--only", "magic"]) == 2
    assert capsys.readouterr().err == "rdt-compare: no row is left: look at --only and --mask-ratios\n"
