from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core.model import RDT
from tests.training.conftest import Settings, saved_at
from training import evaluate, scorer
from training.evaluation.causal import CausalLM
from training.learner import Learner
from training.memory import OutOfMemory
from training.trainer import Trainer

CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
PROCESSOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 9 bytes.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CARD, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (PROCESSOR, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_run_says_what_to_lower_and_what_it_has_saved(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    config = train_settings(**{"training.save_every_n_steps": 2})
    losses = Learner._losses

    def scarce(self: Learner, *arguments: Any) -> Any:
        if self.step == 3:
            raise error
        return losses(self, *arguments)

    monkeypatch.setattr(Learner, "_losses", scarce)
    wanted = "training.batch_size is 4: memory has run out, want less, or a smaller data.max_seq_length: "
    with pytest.raises(OutOfMemory, match=re.escape(f"{wanted}{said}; last good checkpoint: ") + ".*_step_2.pt$"):
        Trainer(config, cpu).fit()
    assert saved_at(config, 2).is_file()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "DataLoader worker (pid(s) 7) exited"),
        (EOFError(), "no answer"),
    ],
)
def test_a_run_that_lost_a_worker_says_so(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(Learner, "_losses", broken)
    wanted = f"data.num_workers is 0: one was lost, perhaps for lack of memory, want less: {said}"
    with pytest.raises(OutOfMemory, match=re.escape(wanted) + ".*; last good checkpoint: none was saved yet$"):
        Trainer(train_settings(), cpu).fit()


def test_other_errors_of_a_step_are_defects(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Learner, "_losses", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Trainer(train_settings(), cpu).fit()


@pytest.mark.parametrize("command", ["rdt-evaluate", "rdt-scorer"])
def test_commands_that_take_batches_say_what_to_lower(
    tiny_checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    *,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scarce(*_: object, **__: object) -> None:
        raise CARD

    monkeypatch.setattr(RDT, "forward", scarce)
    monkeypatch.setattr(CausalLM, "features", scarce)
    small = ["--batch-size", "2", "--length", "12", "--device", "cpu", "--cache-dir", str(tmp_path)]
    if command == "rdt-evaluate":
        status = evaluate.main(["--checkpoint", str(tiny_checkpoint), "--text", str(text_file), *small])
    else:
        given = ["--tokenizer", str(tiny_checkpoint), "--text", str(text_file), "--output", str(tmp_path / "scorer.pt")]
        status = scorer.main([*given, *small])
    assert status == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    wanted = "--batch-size is 2: memory has run out, want less, or a smaller --length: CUDA out of memory."
    assert printed.startswith(f"{command}: {wanted}")
