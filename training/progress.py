"""What a run shows: a bar and lines on the terminal, and curves for TensorBoard.

If one of them can no longer be written (a full disk, a pipe whose reader has left), the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.config import ConfigError


class Progress:
    """The progress of a run of `n_steps` that has made `step` of them; shows nothing with `quiet`."""

    def __init__(self, log_dir: str, step: int, n_steps: int, *, quiet: bool) -> None:
        """Raises `ConfigError` if curves cannot be written at the start."""
        self._log_dir, self._silent = log_dir, quiet
        try:
            self._curves = None if quiet else SummaryWriter(log_dir, purge_step=step + 1)
        except OSError as error:
            raise ConfigError(f"output.log_dir is {log_dir!r}: cannot be written: {error.strerror}") from error
        self._bar: tqdm[Any] = tqdm(total=n_steps, initial=step, desc="training", unit="step", disable=quiet)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._draw(SummaryWriter.close)
        self._tell(self._bar.close)

    def say(self, line: str) -> None:
        self._tell(lambda: self._bar.write(line))

    def advance(self) -> None:
        self._tell(self._bar.update)

    def show(self, **values: str) -> None:
        """Show values beside the bar."""
        self._tell(lambda: self._bar.set_postfix(values))

    def draw(self, values: Mapping[str, float], step: int) -> None:
        """A point on each curve."""

        def add(curves: SummaryWriter) -> None:
            for name, value in values.items():
                curves.add_scalar(name, value, step)

        self._draw(add)

    def _draw(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._curves is None:
            return
        try:
            write(self._curves)
        except OSError as error:
            self._curves = None
            self.say(f"output.log_dir is {self._log_dir!r}: cannot be written, no more curves: {error.strerror}")

    def _tell(self, write: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            write()
        except OSError:
            self._silent = self._bar.disable = True
