"""One process or several: which part of a step each does, and how their results are combined.

    torchrun --nproc_per_node=2 -m training --config ...

With any number of processes, a step has the same batches and the same randomness: process `r` of `P`
takes batches `r`, `r + P`, ... of the step, and the gradients are added up. A run may therefore be
resumed by another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from training.config import ConfigError, one_line

Made = TypeVar("Made")


class Processes(Protocol):
    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes files."""

    def device(self, wanted: torch.device) -> torch.device:
        """The device of this process: with several GPUs each takes one."""

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""

    def first_before_others(self, work: Callable[[], Made]) -> Made:
        """Work that the first process does before the others, because it leaves them something, such as a cache."""

    def close(self) -> None:
        """Wait for the others, and disconnect."""


class OneProcess:
    rank, count, first = 0, 1, True

    def device(self, wanted: torch.device) -> torch.device:
        return wanted

    def add_up(self, values: Tensor) -> Tensor:
        return values

    def first_before_others(self, work: Callable[[], Made]) -> Made:
        return work()

    def close(self) -> None:
        pass


class ManyProcesses:
    """Those that torchrun started, met through `accelerate`: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, on_cpu: bool) -> None:
        try:
            from accelerate import PartialState  # noqa: PLC0415 - one process does without it
        except ImportError as error:
            raise ConfigError("several processes need the package accelerate: pip install '.[training]'") from error
        try:
            self._state = PartialState(cpu=on_cpu)
        except ValueError as error:  # variables that torchrun sets are missing
            raise ConfigError(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r}: want torchrun: {error}") from error
        self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: torch.device) -> torch.device:
        return wanted if wanted.type == "cpu" else self._state.device

    def add_up(self, values: Tensor) -> Tensor:
        with _together():
            torch.distributed.all_reduce(values)
        return values

    def first_before_others(self, work: Callable[[], Made]) -> Made:
        if not self.first:
            self._wait()
        made = work()
        if self.first:
            self._wait()
        return made

    def close(self) -> None:
        self._wait()
        self._state.destroy_process_group()

    def _wait(self) -> None:
        with _together():
            self._state.wait_for_everyone()


@contextmanager
def _together() -> Iterator[None]:
    """Around what all processes do at once. Raises `ConnectionError` if that fails, most often because one of them has
    ended, which has said why.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"the processes of this run cannot go on together: {one_line(error)[:300]}") from error


def meet(wanted: torch.device) -> Processes:
    """The processes of this run, by the environment that torchrun sets. Raises `ConfigError`."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {count!r}: want a whole number, as torchrun sets it")
    return ManyProcesses(wanted.type == "cpu") if int(count) > 1 else OneProcess()


def share(steps: range, a_step: int, processes: Processes) -> Iterator[int]:
    """Numbers of the batches that this process takes in these steps, of which each has `a_step` batches."""
    return (step * a_step + i for step in steps for i in range(processes.rank, a_step, processes.count))


def add_up_gradients(parameters: Sequence[nn.Parameter], others: Tensor, processes: Processes) -> Tensor:
    """Add up every gradient over all processes, and the numbers `others` `(K,)`, whose sum is returned.

    One message for all of them. A parameter without a gradient anywhere stays without one: the optimizer
    leaves it alone, weight decay included.
    """
    if processes.count == 1:
        return others
    given = torch.tensor([p.grad is not None for p in parameters], device=others.device, dtype=torch.float32)
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    total = processes.add_up(torch.cat([others.float(), given, *flat]))
    others, given, gradients = total.split([len(others), len(given), len(total) - len(others) - len(given)])
    present = given.tolist()
    pieces = gradients.split([p.numel() for p in parameters])
    for parameter, piece, n_given in zip(parameters, pieces, present, strict=True):
        parameter.grad = piece.view_as(parameter).clone() if n_given else None
    return others
