"""With the model alone, the other commands say in one line what is missing."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDS = {
    "rdt-serve": ("pydantic", "service"),
    "rdt-denoise": ("pydantic", "service"),
    "rdt-train": ("yaml", "training"),
    "rdt-evaluate": ("sacrebleu", "training"),
    "rdt-compare": ("sacrebleu", "training"),
    "rdt-scorer": ("tqdm", "training"),
}
COMMANDS = [*NEEDS, "rdt-release"]  # which the model alone can do


def test_all_that_are_installed_are_here() -> None:
    assert PROJECT["scripts"].keys() == set(COMMANDS)


@pytest.mark.parametrize("command", NEEDS)
def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    module, _, name = PROJECT["scripts"][command].partition(":")
    run = getattr(import_module(module), name)
    missing, extra = NEEDS[command]
    assert extra in PROJECT["optional-dependencies"]
    for loaded in [*sys.modules]:
        if loaded.partition(".")[0] in ("service", "training", missing):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run() == 2
    hint = f"pip install '.[{extra}]' in the project's folder"
    assert capsys.readouterr().err == f"{command}: {missing} is missing: {hint}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_with_everything_there_they_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    module, _, name = PROJECT["scripts"][command].partition(":")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        getattr(import_module(module), name)()
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    module, _, name = PROJECT["scripts"][command].partition(":")
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    assert getattr(import_module(module), name)() == 0
    assert capsys.readouterr().out == f"{command} {PROJECT['version']}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_libraries_load_is_no_traceback(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    module, _, name = PROJECT["scripts"][command].partition(":")
    monkeypatch.setattr(import_module(module), "import_module", interrupted)
    monkeypatch.setattr(sys, "argv", [command])
    assert getattr(sys.modules[module], name)() == 130
