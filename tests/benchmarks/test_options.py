"""A wrong value on a command line is one line that names it, before anything is measured."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import BUNDLED, engine, gpu, options, precision, serve, simulate
from benchmarks.files import names_files
from benchmarks.options import amount, count, natural, positive, share
from rdt_core import checkpoint

FOLDER = Path(options.__file__).parent


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (natural, {"0": 0, "7": 7}, ["-1", "1.5", "", "many"]),
        (count, {"1": 1, "7": 7}, ["0", "-1", "1.5"]),
        (amount, {"0": 0.0, "1e-3": 0.001}, ["-0.1", "nan", "inf", "much"]),
        (positive, {"1e-9": 1e-9, "3": 3.0}, ["0", "-1", "nan", "inf"]),
        (share, {"0.15": 0.15, "1": 1.0}, ["0", "-1", "1.1", "nan"]),
    ],
)
def test_a_number_out_of_range_is_named(
    kind: Callable[[str], Any], good: dict[str, float], bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=kind)
    for text, value in good.items():
        assert parser.parse_args([f"--n={text}"]).n == value
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--n={text}"])
        assert f"--n: {text!r}: want a " in capsys.readouterr().err


def test_no_number_is_without_a_range() -> None:
    for path in FOLDER.glob("*.py"):
        assert not re.search(r"\btype=(int|float)\b", path.read_text(encoding="utf-8")), path


def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/measure.py"])
    for missing in (tmp_path / "best_model.pt", tmp_path):
        with pytest.raises(SystemExit, match=f"^measure: {missing}: no "):
            names_files(checkpoint.read)(missing)
    with pytest.raises(ZeroDivisionError):
        names_files(lambda: 1 // 0)()


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (engine.main, ["--workloads", "mixed", "gate"], "the gate workload needs a checkpoint .* and a text"),
        (
            engine.main,
            [f"--model={BUNDLED}", "--workloads", "mixed", "gate", "--text={text}"],
            "--text: .* at least 1000",
        ),
        (
            engine.main,
            [f"--model={BUNDLED}", "--workloads", "mixed", "gate", "--text={other}"],
            "--text: 'utf-8' codec",
        ),
        (gpu.main, ["--models", str(BUNDLED), "best.pt"], "gpu: best.pt: no such file"),
        (serve.main, ["--model=best.pt"], "serve: best.pt: no such file"),
        (simulate.main, ["--check={text}"], "simulate: --check: want a saved result of benchmarks.serve"),
        (simulate.main, ["--check={result}"], "simulate: --check: want a saved result of benchmarks.serve"),
        (precision.main, ["--text={text}", "--mask-ratios", "2"], "2"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    main: Callable[[], None], words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / name for name in ("text", "other", "result")}
    files["text"].write_text("[]", encoding="utf-8")
    files["other"].write_bytes(b"\xff")
    files["result"].write_text('{"benchmark": "engine", "options": {}}', encoding="utf-8")
    for module in (engine, serve):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(gpu, "matrix_peak", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(serve, "serving", lambda *_: pytest.fail("served"))
    program = f"benchmarks/{main.__module__.rpartition('.')[2]}.py"
    monkeypatch.setattr(sys, "argv", [program, *(word.format(**files) for word in words)])
    with pytest.raises(SystemExit, match=said):
        main()
