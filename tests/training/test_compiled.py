"""Compiled layers compute what the others do, whatever the lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.training.conftest import Settings
from training import trainer as module
from training.compiled import compile_layers
from training.trainer import Trainer


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at its own
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_run_is_the_same_run(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    counter: Any = CompileCounterWithBackend("aot_eager")  # graphs without machine code, which takes a compiler
    monkeypatch.setattr(module, "compile_layers", lambda model: compile_layers(model, counter))
    positions = {"pre": "rotary", "post": "learned"}[norm]
    changes: dict[str, Any] = {"training.num_steps": 24, "data.min_seq_length": 4, "training.grad_passes": 1}
    changes |= {"model.norm": norm, "model.positions": positions}
    runs, n_graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        trainer = Trainer(train_settings(**changes, **{"training.compile": compiled}), cpu)
        runs.append([])
        for losses in trainer._steps():
            runs[-1].append(losses.recon.item())
            n_graphs.append(counter.frame_count)
    later = {trainer.batches[index].length for index in range(12, 24)}
    assert len(later) > 5
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)
    assert 0 < n_graphs[-12] == n_graphs[-1], "each length is compiled anew"
    assert set(trainer.model.state_dict()) == set(Trainer(train_settings(**changes), cpu).model.state_dict())
