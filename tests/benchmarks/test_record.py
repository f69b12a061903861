"""A result says what it was measured on."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import record


def test_a_line_names_the_code_and_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "best_model.pt"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "abc1234-dirty")
    options = argparse.Namespace(model=str(weights), preset="base", threads=1, text="", save="mine")
    record.finish("mine", options, rate=3.0)
    line = json.loads(capsys.readouterr().out)
    assert line == json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    assert line["files"] == {"best_model.pt": hashlib.sha256(b"weights").hexdigest()[:12]}
    assert (line["benchmark"], line["commit"], line["rate"]) == ("mine", "abc1234-dirty", 3.0)
    assert line["options"]["preset"] == "base"


@pytest.mark.parametrize("name", ["", "..", "runs/mine", "/mine"])
def test_a_result_has_a_name_and_no_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That there is none would turn out when everything has been measured."""
    with pytest.raises(SystemExit):
        record.parser(None).parse_args(["--save", name])
    assert f"--save: {name!r}: want a name" in capsys.readouterr().err


def test_without_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", record.commit() or "0000000")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert record.commit() is None
