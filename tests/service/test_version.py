from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from service import commands
from service import version as module


def test_the_release_is_the_packages() -> None:
    assert module.release() == version("rdt")


def test_a_checkout_that_is_not_installed_has_one_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(module, "version", missing)
    assert module.release() == "0"
    monkeypatch.setattr("sys.argv", ["service", "--version"])
    assert commands.serve() == 0
    assert capsys.readouterr().out == "rdt-serve 0\n"
