"""Where the modules of children come from: where their parent's do, not from whatever folder it was started in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.workers.children import BAD_INPUT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project with other children: each ends at once, with a status that ends the server."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "service", tree / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "rdt_core").symlink_to(ROOT / "rdt_core")
    child = tree / "service" / "workers" / "__main__.py"
    child.write_text(f"import logging, sys; sys.exit({BAD_INPUT} if logging.INFO else 1)")
    return tree


@pytest.mark.parametrize("installed", [True, False])
def test_modules_come_from_where_the_parents_come_from(tree: Path, tmp_path: Path, installed: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "logging.py").write_text("raise SystemExit(77)")
    script = tmp_path / "rdt-serve"
    script.write_text("import sys; from service.commands import serve; sys.exit(serve())")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if installed:
        command, folder = [str(script)], elsewhere
        environment["PYTHONPATH"] = str(tree)
    else:
        command, folder = ["-m", "service"], tree
    ended = subprocess.run(
        [sys.executable, *command, "--api_workers=1", "--http_port=0", "--grpc_port=0"],
        cwd=folder, env=environment, timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == BAD_INPUT, ended.stderr
