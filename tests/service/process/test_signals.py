from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from service.process import signals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_who_is_asked_to_end_is_told(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    stopped = signals.asked_to_end()
    signal.raise_signal(number)
    async with asyncio.timeout(5):
        await stopped.wait()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(each)


async def test_a_hangup_that_comes_too_early_waits() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    reloaded = asyncio.Event()
    with signals.hangup_held():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        child.send_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signals.take_hangup(reloaded.set)
        async with asyncio.timeout(5):
            await reloaded.wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("ignored", "terminal", "ends"),
    [
        (False, [True, False], True),  # the terminal has gone
        (False, [True, True], False),
        (False, [False, False], False),  # a service
        (True, [True, False], False),  # under nohup: it may go
    ],
)
async def test_a_hangup_ends_only_who_was_the_terminals(
    monkeypatch: pytest.MonkeyPatch, ignored: bool, terminal: list[bool], ends: bool
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    answers = iter(terminal)
    monkeypatch.setattr(signals, "_has_terminal", lambda: next(answers, False))
    stopped, reloaded = asyncio.Event(), asyncio.Event()
    signals.on_hangup(reloaded.set, stopped)
    signal.raise_signal(signal.SIGHUP)
    async with asyncio.timeout(5):
        await (stopped if ends else reloaded).wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    assert stopped.is_set() != reloaded.is_set()
