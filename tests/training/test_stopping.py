"""Signals that end a run early."""

from __future__ import annotations

import signal

import pytest

from training.stopping import SAME_REQUEST_SECONDS, stop_signal


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_request_may_come_as_several_signals(number: int) -> None:
    """A scheduler signals every process of a job, and `torchrun` passes on the signal that it had itself."""
    clock = Clock()
    with stop_signal(clock) as signals:
        signal.raise_signal(number)
        clock.now += SAME_REQUEST_SECONDS - 0.1
        signal.raise_signal(number)
        assert signals


def test_asking_again_ends_the_run_at_once() -> None:
    clock = Clock()
    with pytest.raises(KeyboardInterrupt), stop_signal(clock):  # noqa: PT012 - the second signal, not the first
        signal.raise_signal(signal.SIGINT)
        clock.now += SAME_REQUEST_SECONDS + 0.1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
