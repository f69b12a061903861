"""Children take their modules from where their parent's come from, not from whatever folder it was started in; and one
that stands still is killed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.process.loop import new_event_loop
from service.settings import Settings
from service.workers import children
from service.workers.children import BAD_INPUT, Child, Orders

ROOT = Path(__file__).parents[3]


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


CHILD = """
import asyncio, faulthandler, os, sys, time
from service.workers import children
faulthandler.register(children.TELL)
children.PULSE_SECONDS = 0.001

async def main():
    children.start_pulse()
    await asyncio.sleep(0.1)
    {then}

asyncio.run(main())
"""


async def born(then: str, monkeypatch: pytest.MonkeyPatch, stuck_seconds: float = 60) -> Child:
    """A child that has a pulse for a moment."""
    monkeypatch.setattr(children, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(Child, "command", (sys.executable, "-c", CHILD.format(then=then)))
    return await Child.start(Orders.of("worker", "0.0", Path("none"), Settings(stuck_seconds=stuck_seconds)))


async def fate(child: Child) -> int:
    """Its exit status, once nobody watches it any more."""
    status = await asyncio.wait_for(child.wait(), 30)
    await asyncio.wait_for(child._watching, 30)
    return status


async def test_a_child_that_stands_still_says_where_and_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(children, "LAST_WORDS_SECONDS", 0.5)
    child = await born("time.sleep(60)", monkeypatch)
    assert await fate(child) == -signal.SIGKILL
    assert "worker 0.0 has stood still for 0.6 s: killing it" in caplog.text
    assert "in main" in capfd.readouterr().err


async def test_a_child_that_may_stand_still_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    child = await born("time.sleep(1)", monkeypatch, stuck_seconds=0)
    assert await fate(child) == 0


async def test_a_child_with_a_pulse_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    child = await born("await asyncio.sleep(1)", monkeypatch)
    assert await fate(child) == 0


async def test_a_child_may_take_its_time_before_its_first_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(Child, "command", (sys.executable, "-c", "import time; time.sleep(0.5)"))
    child = await Child.start(Orders.of("worker", "0.0", Path("none"), Settings()))
    assert await fate(child) == 0


async def test_a_child_whose_supervisor_reads_nothing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pulses stay unread until there is no more room for them."""

    async def reads_nothing(child: Child) -> None:
        await child.wait()

    monkeypatch.setattr(Child, "_watch", reads_nothing)
    child = await born("await asyncio.sleep(2)", monkeypatch)
    assert await fate(child) == 0


def test_a_child_ends_when_its_parent_dies_with_pulses_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end then comes as a reset of the connection, after which uvloop never calls again."""

    async def main() -> None:
        children.start_pulse()
        stopped = asyncio.Event()
        orphaned = children.end_with_parent(stopped)
        parents_end.close()
        await asyncio.wait_for(stopped.wait(), 10)
        assert orphaned.is_set()

    parents_end, childs_end = socket.socketpair()
    with parents_end, childs_end, asyncio.Runner(loop_factory=new_event_loop) as runner:
        monkeypatch.setattr("sys.stdin", childs_end)
        runner.run(main())


def test_orders_carry_all_settings_and_keys_only_through_the_pipe() -> None:
    settings = Settings(api_key=SecretStr("s3cret"), checkpoint=Path("x/y.pt"), api_workers=3, shed="depth")
    orders = Orders.of("worker", "1.0", Path("/run/engine"), settings)
    back = Orders.read(orders.line().decode())
    assert back == orders
    assert Settings(**back.settings) == settings
    assert Settings(**back.settings).api_key == SecretStr("s3cret")


async def test_a_child_ends_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        stopped = asyncio.Event()
        orphaned = children.end_with_parent(stopped)
        os.write(writing, b"noise")
        await asyncio.sleep(0.01)
        assert not stopped.is_set()
        os.close(writing)
        await asyncio.wait_for(stopped.wait(), 1)
        assert orphaned.is_set()
