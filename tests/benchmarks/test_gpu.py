"""That the script for a card runs where there is little but torch, and loses nothing it has found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALONE = """
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "pydantic", "yaml", "grpc", "starlette", "hypothesis", "httpx"}:
            raise ModuleNotFoundError(f"{name} is not on a bare machine")

sys.meta_path.insert(0, Bare())
"""


@pytest.mark.parametrize(
    "runs",
    [
        "import benchmarks.gpu",
        "import pytest; sys.exit(pytest.main('-c /dev/null --rootdir=. --co -q tests/gpu'.split()))",
    ],
)
def test_little_but_torch_is_wanted(runs: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(
        [sys.executable, "-c", ALONE + runs], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path: Path) -> None:
    """The Python of this test fails for everything to do with `base`, after it has said something."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *"--models base"*) exit 1;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    found = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rounds", "1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout.endswith("failed or not finished: ladder-base\n")
    said = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert "--models base" in said["ladder-base"]
    assert all(said[name].endswith("--rounds 1\n") for name in said if name.startswith(("agreement", "ladder")))
    assert {"machine", "tests", "agreement", "ladder-rdt-small", "ladder-large", "training"} < set(said)
    assert len(said) <= 8


def test_without_a_card_nothing_is_measured(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    found = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["machine.log"]
