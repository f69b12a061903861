"""The environment that `make` keeps: made anew where it was moved, by what needs it, and left alone otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    return tmp_path


def make(project: Path, *arguments: str) -> list[str]:
    """The lines of what `make` says and, asked for `-n`, would do."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    command = ["make", *arguments]
    run = subprocess.run(command, cwd=project, env=alone, capture_output=True, text=True, check=True, timeout=60)
    return run.stdout.splitlines()


def environment(at: Path, home: Path | None = None) -> Path:
    """An environment that is complete, as `home` has it if that is elsewhere."""
    (at / "bin").mkdir(parents=True)
    (at / "bin" / "python").symlink_to(sys.executable)
    (at / "bin" / "pip").write_text(f"#!{home or at}/bin/python\n")
    for stamp in ("service", "all"):
        (at / stamp).touch()
    return at


def test_what_runs_is_kept(project: Path) -> None:
    environment(project / ".venv")
    assert not any("-m venv" in line or "pip" in line for line in make(project, "-n", "test"))


def test_what_was_moved_is_made_anew_by_what_needs_it(project: Path) -> None:
    environment(project / ".venv", home=project / "elsewhere" / ".venv")
    make(project, "help")
    make(project, "-n", "test")
    assert (project / ".venv" / "all").exists(), "nothing was asked for that needs it"
    asked = make(project, "-n", "test")
    assert any(line.endswith("-m venv --clear .venv") for line in asked)
    assert any("install" in line for line in asked)


def test_of_a_link_only_the_link_is_made_anew(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = environment(tmp_path_factory.mktemp("elsewhere") / ".venv")
    (project / ".venv").symlink_to(elsewhere)
    (stub := project / "stub").write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    make(project, ".venv/bin/pip", f"PYTHON={stub}")
    assert not (project / ".venv").exists()
    assert (elsewhere / "all").exists()


def test_what_has_no_pip_is_not_cleared(project: Path) -> None:
    (environment(project / ".venv") / "bin" / "pip").unlink()
    assert any(line.endswith("-m venv .venv") for line in make(project, "-n", "test"))


def test_an_environment_elsewhere_is_used_as_it_is(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = environment(tmp_path_factory.mktemp("elsewhere") / "venv")
    (asked,) = make(project, "-n", "test", f"VENV={elsewhere}")
    assert f" {elsewhere}/bin/pytest " in asked
