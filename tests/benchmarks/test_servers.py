"""Servers that are measured, ours and others: what is said when one ends, and that none is left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import server
from benchmarks.peer_servers import start
from benchmarks.server import saying_why


def started(script: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(["sh", "-c", script], stdout=file, start_new_session=True)


def test_of_a_server_that_ends_meanwhile_its_log_is_shown(tmp_path: Path) -> None:
    process = started("echo out of memory; exit 3", tmp_path / "log")
    wanted = pytest.raises(RuntimeError, match="ended with 3:\nout of memory")
    with wanted, saying_why("the server", process, tmp_path / "log"):
        raise ConnectionRefusedError


def test_what_fails_while_the_server_runs_is_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "END_SECONDS", 0.01)
    process = started("exec sleep 60", tmp_path / "log")
    try:
        with pytest.raises(ZeroDivisionError), saying_why("the server", process, tmp_path / "log"):
            raise ZeroDivisionError
    finally:
        process.kill()
        process.wait()


def test_a_peer_does_not_outlive_a_second_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the peer, asked nicely, is waited for."""
    process = started("trap '' TERM; echo; exec sleep 60", tmp_path / "log")
    wait = process.wait

    def interrupted(timeout: float | None = None) -> Any:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait(30)

    monkeypatch.setattr(process, "wait", interrupted)
    while not (tmp_path / "log").read_bytes():
        pass
    with pytest.raises(KeyboardInterrupt):
        start.stop(process)
    assert process.poll() is not None
    assert start._session(process.pid) == []
