"""Where a run keeps its checkpoints: the last few to resume from, and the best."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from rdt_core import checkpoint
from rdt_core.checkpoint import Checkpoint
from training.files import make_folder


class RunFolder:
    """The checkpoints of one run. Those of another run in the same folder are replaced if they have the same name, but
    never removed.

    Raises `ConfigError` for a folder that cannot be written.
    """

    def __init__(self, path: Path, keep_last: int) -> None:
        self.path, self._keep_last = path, keep_last
        self._own: list[Path] = []  # checkpoints of this run, oldest first
        make_folder(path, "output.checkpoint_dir")

    @property
    def best(self) -> Path:
        return self.path / "best_model.pt"

    def is_used(self) -> bool:
        return any(self.path.glob("*.pt"))

    def remove_partial_files(self) -> None:
        """Remove what a run has left that was killed while it saved; files of a run that is saving stay."""
        for left in self.path.glob(".*.pt.*.partial"):
            if not _of_another_process(left):
                left.unlink(missing_ok=True)

    def of_step(self, epoch: int, step: int) -> Path:
        return self.path / f"checkpoint_epoch_{epoch}_step_{step}.pt"

    def save(self, saved: Checkpoint) -> None:
        """Write a checkpoint to resume from, which names those that are kept: the last few. Drop the others."""
        path = self.of_step(saved.epoch, saved.step)
        own = [*(file for file in self._own if file != path), path]
        dropped, self._own = own[: -self._keep_last], own[-self._keep_last :]
        kept = [file.name for file in self._own]
        checkpoint.save(path, replace(saved, progress=(saved.progress or {}) | {"kept": kept}))
        for file in dropped:
            file.unlink(missing_ok=True)

    def take_over(self, path: Path, resumed: Checkpoint) -> None:
        """Count the resumed checkpoint as this run's, and those that it names, if they are here."""
        if path.resolve().parent == self.path.resolve():
            named = {path.name, *(resumed.progress or {}).get("kept", ())}
            here = [file for file in self.path.glob("checkpoint_*.pt") if file.name in named and _step_of(file) >= 0]
            self._own = sorted(here, key=_step_of)


def _of_another_process(partial: Path) -> bool:
    """Whether the process named in it is alive on this machine. Not this process, which has not saved yet."""
    number = partial.suffixes[-2][1:]
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for names that no run gives, such as those of copies."""
    found = re.fullmatch(r"checkpoint_epoch_\d+_step_(\d+)\.pt", path.name)
    return -1 if found is None else int(found[1])
