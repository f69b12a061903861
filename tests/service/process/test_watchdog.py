"""A process whose event loop stands still ends, and says where it stood."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PROCESS = """
import asyncio, logging, time
from service.process import watchdog
logging.basicConfig()
watchdog.POLL_SECONDS, watchdog.LAST_WORDS_SECONDS = 0.3, 5

async def main():
    watchdog.watch_event_loop()
    await asyncio.sleep(0)
    {then}

with asyncio.Runner() as runner:
    runner.run(main())
    time.sleep(1.4)
time.sleep(0.2)
print("alive")
"""


def run(then: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROCESS.format(then=then)], timeout=60, capture_output=True, text=True, check=False
    )


def test_a_loop_that_stands_still_ends_the_process() -> None:
    ended = run("time.sleep(300)")
    assert ended.returncode == 1
    assert "the event loop has stood still for 0.9 s: ending the process" in ended.stderr
    assert "in main" in ended.stderr


def test_a_log_that_nobody_reads_does_not_keep_it() -> None:
    """The lock of the log is held: the loop may stand still for just that."""
    ended = run("watchdog.LAST_WORDS_SECONDS = 0.2; logging.root.handlers[0].acquire(); time.sleep(300)")
    assert ended.returncode == 1
    assert not ended.stderr


@pytest.mark.parametrize("then", ["await asyncio.sleep(1.5)", "pass"])
def test_a_loop_that_turns_or_has_ended_does_not(then: str) -> None:
    ended = run(then)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "alive\n", "")


def test_a_process_that_was_stopped_as_a_whole_goes_on() -> None:
    """Of that the watch sees one poll without an answer, whatever it took."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(then="print('up', flush=True); await asyncio.sleep(2)")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "alive\n"


SERVER = """
import os, sys, time
from service import cli, hosting
from service.process import watchdog
from service.workers.supervisor import Crew
watchdog.POLL_SECONDS = 0.3

async def stands_still(*_):
    time.sleep(1.5 if "--stuck_seconds=0" in sys.argv else 300)
    os._exit(5)

hosting.Host.load = Crew.work = stands_still
cli.serve(["--http_port=0", "--grpc_port=0", *sys.argv[1:]])
"""


@pytest.mark.parametrize("where", ["--api_workers=0", "--api_workers=1"])
@pytest.mark.parametrize(("longest", "status"), [("--stuck_seconds=60", 1), ("--stuck_seconds=0", 5)])
def test_a_server_and_a_supervisor_are_watched(where: str, longest: str, status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SERVER, where, longest], timeout=60, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert ("has stood still" in ended.stderr) == (status == 1)
