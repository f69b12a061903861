"""A run that ends before its last step: signals, and a loss that is no number."""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from rdt_core import checkpoint
from tests.training.conftest import Settings, saved_at
from training.data import Batch
from training.learner import Learner, TrainingDiverged
from training.losses import Losses
from training.memory import OutOfMemory
from training.processes import OneProcess
from training.stopping import SAME_REQUEST_SECONDS, command, stop_signal
from training.trainer import Trainer

Own: TypeAlias = Sequence[tuple[int, Batch]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run_and_handlers_come_back(
    train_settings: Settings, cpu: torch.device, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    config = train_settings()
    trainer = Trainer(config, cpu)
    step = trainer.learner.learn

    def interrupted(batches: Own, *, stop_asked: bool) -> Losses:
        if trainer.step == 2:
            signal.raise_signal(number)
        return step(batches, stop_asked=stop_asked)

    trainer.learner.learn = interrupted  # type: ignore[method-assign]
    assert trainer.fit() is False
    path = saved_at(config, 3)
    assert f"stopped at step 3; go on with --checkpoint {path}" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_stops_nothing(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(trainer: Trainer, *_: object) -> None:
        if trainer.step == 8:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_log", interrupt)
    assert Trainer(train_settings(), cpu).fit() is True


def test_of_several_processes_only_the_first_says_where_the_run_stopped(
    train_settings: Settings, cpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(train_settings(**{"output.eval_every_n_steps": 1}), cpu, processes=SecondProcess())
    step = trainer.learner.learn

    def interrupted(batches: Own, *, stop_asked: bool) -> Losses:
        signal.raise_signal(signal.SIGTERM)
        return step(batches, stop_asked=stop_asked)

    trainer.learner.learn = interrupted  # type: ignore[method-assign]
    assert trainer.fit() is False
    said = capsys.readouterr()
    assert said.out == said.err == ""
    assert not list(trainer.folder.path.glob("*.pt")), "and the first alone writes what is kept"


class SecondProcess(OneProcess):
    first = False


class OneOfTwo(OneProcess):
    """The other of which says in every step whether it was asked to stop."""

    count = 2

    def __init__(self, *, other_asked: bool) -> None:
        self.other_asked = other_asked

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        values[2] += self.other_asked  # after two losses
        return values


def test_a_signal_that_only_another_process_had_stops_this_one(train_settings: Settings, cpu: torch.device) -> None:
    config = train_settings(**{"training.gradient_accumulation_steps": 2})
    assert Trainer(config, cpu, processes=OneOfTwo(other_asked=True)).fit() is False
    assert saved_at(config, 1).is_file()


def test_a_signal_that_only_this_process_had_stops_it_once_the_other_knows(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, it would leave the other waiting for it in the next step."""

    def interrupt(trainer: Trainer, *_: object) -> None:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_log", interrupt)
    config = train_settings(**{"training.gradient_accumulation_steps": 2})
    assert Trainer(config, cpu, processes=OneOfTwo(other_asked=False)).fit() is False
    assert saved_at(config, 3).is_file()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # about forking; lost as an error before 3.15
def test_a_signal_to_the_whole_group_leaves_the_workers_their_batch(
    train_settings: Settings, cpu: torch.device
) -> None:
    """As torchrun and schedulers send it: a worker that ended at once would take the run with it, unsaved."""
    config = train_settings(**{"data.num_workers": 2})
    trainer = Trainer(config, cpu)
    step = trainer.learner.learn

    def terminated(batches: Own, *, stop_asked: bool) -> Losses:
        if trainer.step == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for worker in workers:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return step(batches, stop_asked=stop_asked)

    trainer.learner.learn = terminated  # type: ignore[method-assign]
    assert trainer.fit() is False
    assert saved_at(config, 3).is_file()


@pytest.mark.usefixtures("interruptible")
def test_a_command_that_is_interrupted_has_no_traceback() -> None:
    assert command(lambda: signal.raise_signal(signal.SIGINT) or 0)() == 130


def test_a_command_escapes_what_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert command(lambda: print("25.00 ± 1.10", flush=True) or 0)() == 0  # type: ignore[func-returns-value]
    assert printed.getvalue() == b"25.00 \\xb1 1.10\n"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal; a job in a shell's background begins with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.mark.usefixtures("interruptible")
def test_asking_again_ends_a_run_that_is_stuck() -> None:
    clock = Clock()
    with pytest.raises(KeyboardInterrupt), stop_signal(clock):  # noqa: PT012 - the second signal, not the first
        signal.raise_signal(signal.SIGINT)
        clock.now += SAME_REQUEST_SECONDS + 0.1
        signal.raise_signal(signal.SIGINT)


def test_a_loss_that_is_no_number_ends_the_run(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_settings(**{"training.save_every_n_steps": 2, "output.eval_every_n_steps": 100})
    trainer = Trainer(config, cpu)
    log = Trainer._log

    def poison(self: Trainer, *arguments: Any) -> None:
        log(self, *arguments)
        if self.step == 3:
            self.model.inject.weight.data[0, 0] = math.nan

    monkeypatch.setattr(Trainer, "_log", poison)
    with pytest.raises(TrainingDiverged, match="at step 4; last good checkpoint: ") as error:
        trainer.fit()
    assert str(error.value).endswith(str(saved_at(config, 2)))
    assert checkpoint.load(saved_at(config, 2))


def test_a_gradient_that_is_not_finite_is_not_stepped(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be found a step later, when the weights with it were the only ones saved."""
    changes = {"training.save_every_n_steps": 1, "training.keep_last_n_checkpoints": 1}
    config = train_settings(**changes, **{"output.eval_every_n_steps": 100})
    trainer = Trainer(config, cpu)
    add_up = Learner._add_up

    def poison(self: Learner, *arguments: Any) -> Any:
        if self.step == 2:
            assert self.model.inject.weight.grad is not None
            self.model.inject.weight.grad[0, 0] = math.inf
        return add_up(self, *arguments)

    monkeypatch.setattr(Learner, "_add_up", poison)
    with pytest.raises(TrainingDiverged, match="the gradient is not finite at step 3; last good checkpoint: "):
        trainer.fit()
    assert checkpoint.load(saved_at(config, 2))


def test_a_run_that_diverges_at_once_says_that_nothing_was_saved(train_settings: Settings, cpu: torch.device) -> None:
    trainer = Trainer(train_settings(), cpu)
    trainer.model.inject.weight.data[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match="at step 1; last good checkpoint: none was saved yet"):
        trainer.fit()


def test_a_last_step_that_diverges_is_no_run_that_ended_well(train_settings: Settings, cpu: torch.device) -> None:
    """No step comes after it that would find out: the run ended with status 0 and without a best model."""
    config = train_settings(**{"training.learning_rate": 1e30, "training.num_steps": 1})
    with pytest.raises(TrainingDiverged, match=r"the validation loss is not finite at step 1; .*: none was saved"):
        Trainer(config, cpu).fit()
    assert not list(Path(config.output.checkpoint_dir).glob("*.pt"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in one
def test_a_full_disk_under_the_logs_costs_the_curves_and_no_step(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_settings()
    log = Trainer._log

    def fill_disk(self: Trainer, *arguments: Any) -> None:
        if self.step == 2:
            (events,) = Path(config.output.log_dir).iterdir()
            events.unlink()
            events.symlink_to("/dev/full")
        log(self, *arguments)

    monkeypatch.setattr(Trainer, "_log", fill_disk)
    assert Trainer(config, cpu).fit() is True
    assert saved_at(config, 8).is_file()
    told = f"output.log_dir is {config.output.log_dir!r}: cannot be written, no more curves: No space left on device"
    assert capsys.readouterr().out.count(told) == 1


def test_a_run_whose_output_nobody_can_take_goes_on(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_settings(**{"output.eval_every_n_steps": 1})
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert Trainer(config, cpu).fit() is True
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()  # what it still holds
    assert saved_at(config, 8).is_file()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_no_worker_outlives_a_defect(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its traceback is kept, too: at its end Python waits for processes that its own SIGTERM does not end."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Learner, "_losses", broken)
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError) as kept:
        Trainer(train_settings(**{"data.num_workers": 2}), cpu).fit()
    assert set(multiprocessing.active_children()) <= before
    assert kept.tb is not None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_run_that_loses_a_worker_ends_and_leaves_none(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())

    def kill_one(trainer: Trainer, *_: object) -> None:
        if trainer.step == 3:
            (set(multiprocessing.active_children()) - before).pop().kill()

    monkeypatch.setattr(Trainer, "_log", kill_one)
    config = train_settings(**{"data.num_workers": 2, "training.save_every_n_steps": 2, "training.num_steps": 200})
    with pytest.raises((OutOfMemory, OSError)):  # it shows first in a signal's handler, or on a connection
        Trainer(config, cpu).fit()
    assert set(multiprocessing.active_children()) <= before
