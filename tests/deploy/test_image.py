"""The Dockerfile and its context. Whether it builds, `deploy/check.sh` sees."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = {
    re.match(r"\S+ AS (\w+)\n", stage).group(1): stage  # type: ignore[union-attr]
    for stage in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
}
TARGETS = ("training", "service")


def test_no_frontend_is_pulled() -> None:
    assert "syntax=" not in TEXT


def test_the_base_is_one_pinned_image() -> None:
    bases = set(re.findall(r"^FROM (\S+)", TEXT, flags=re.MULTILINE)) - STAGES.keys()
    assert bases == {"python:3.11-slim-bookworm"}
    assert list(STAGES)[-1] == "service"  # what `docker build .` makes


@pytest.mark.parametrize("extras", ["service", "otel", "service,otel", "ray"])
def test_the_lists_ask_nobody_else_for_the_project(tmp_path: Path, extras: str) -> None:
    """`rdt[service]` of an index would be another project."""
    (script,) = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", STAGES["lists"], flags=re.MULTILINE | re.DOTALL)
    script = script.replace("/project/", f"{ROOT}/")
    subprocess.run([sys.executable, "-c", script, extras], cwd=tmp_path, check=True)
    listed = (tmp_path / "service.txt").read_text().splitlines()
    assert not [line for line in listed if line.startswith("rdt")]
    assert {"torch", "fastapi", "grpcio"} <= {re.split(r"[\[>=]", line)[0] for line in listed}
    assert len(listed) == len(set(listed))
    named = {"service": "uvicorn", "otel": "opentelemetry-sdk", "ray": "ray"}[extras.rpartition(",")[2]]
    assert any(line.startswith(named) for line in listed)


@pytest.mark.parametrize("target", TARGETS)
def test_the_process_is_nobody_and_gets_the_signals(target: str) -> None:
    assert re.findall(r"^USER (\w+)", STAGES[target], flags=re.MULTILINE) == ["rdt"]
    assert "RUN" not in STAGES[target].partition("USER rdt")[2]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)", STAGES[target], flags=re.MULTILINE)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert json.loads(entry)[0] in scripts  # the exec form: no shell between


def test_the_probe_is_python_that_runs() -> None:
    (probe,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*?\])$", TEXT.replace("\\\n", ""), flags=re.MULTILINE)
    *_, flag, script = json.loads(probe)
    assert flag == "-c"
    compile(script, "probe", "exec")
    assert "/health/ready" in script


def test_dependencies_come_before_sources() -> None:
    assert "COPY service" not in STAGES["dependencies"]
    assert "COPY pyproject.toml" not in STAGES["dependencies"]
    copied = re.findall(r"^COPY (?!--from)(\S+)", STAGES["runtime"] + STAGES["service"], flags=re.MULTILINE)
    assert copied == ["models/rdt-small"]


def test_what_builds_the_wheel_is_pinned() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(any(pin.startswith(re.split(r"[>=]", need)[0] + "==") for pin in pins) for need in requires)
    (copied,) = re.findall(r"^COPY (.*constraints.*) (\S+/)$", STAGES["package"], flags=re.MULTILINE)
    assert "constraints.txt" in copied[0].split()
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f"{name}={copied[1]}constraints.txt" in STAGES["package"]


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    first, *lines = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, flags=re.MULTILINE)
    sources = {name for names in copied for name in names.split()}
    assert all((ROOT / name).exists() for name in kept)
    assert all(any(name.startswith(source) for source in sources) for name in kept), kept
    assert all(any(name.startswith(source) or source.startswith(name) for name in kept) for source in sources), sources
