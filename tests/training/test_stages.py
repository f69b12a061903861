"""What is taught when: one pass, unrolls of random depths, the gate's two kinds of level; and what validation asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rdt_core import Packing
from tests.training.conftest import Settings
from training import learner, trainer
from training.data import Batch
from training.trainer import Trainer


def test_the_first_steps_take_one_pass(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    unroll = learner.unroll_losses

    def count(model: Any, batch: Batch, packing: Packing, n_passes: int, section: Any) -> torch.Tensor:
        taken.append(n_passes)
        return unroll(model, batch, packing, n_passes, section)

    monkeypatch.setattr(learner, "unroll_losses", count)
    trainer = Trainer(train_settings(**{"training.one_pass_steps": 5, "training.num_steps": 40}), cpu)
    gates = [losses.gate.item() for losses in trainer._steps()]
    assert set(taken[:5]) == {1}
    assert set(taken[5:]) == {1, 2, 3, 4}
    assert [step for step, gate in enumerate(gates) if gate != 0] == list(range(5, 40, 4))


@pytest.mark.parametrize("stages", [{"one_pass_steps": 2}, {"one_pass_steps": 3, "gate_steps": 2}])
def test_validation_takes_as_many_passes_as_have_been_taught(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, stages: dict[str, int]
) -> None:
    """The gate's own steps take many."""
    taken, validate = [], trainer.validate

    def count(*arguments: Any, n_passes: int | None) -> Any:
        taken.append(n_passes)
        return validate(*arguments, n_passes=n_passes)

    monkeypatch.setattr(trainer, "validate", count)
    changes = {f"training.{name}": value for name, value in stages.items()}
    changes |= {"training.num_steps": 4, "output.eval_every_n_steps": 1}
    Trainer(train_settings(**changes), cpu).fit()
    assert taken == [1, 1, None, None]


def test_every_batch_of_a_step_draws_a_depth_of_its_own(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same one however many there are to a step."""
    depths: list[list[int]] = []
    unroll = learner.unroll_losses

    def count(model: Any, batch: Batch, packing: Packing, n_passes: int, section: Any) -> torch.Tensor:
        depths[-1].append(n_passes)
        return unroll(model, batch, packing, n_passes, section)

    monkeypatch.setattr(learner, "unroll_losses", count)
    for accumulate, steps in ((1, 12), (3, 4)):
        depths.append([])
        changes = {"training.gradient_accumulation_steps": accumulate, "training.num_steps": steps}
        for _ in Trainer(train_settings(**changes), cpu)._steps():
            pass
    assert depths[0] == depths[1]
    assert any(len(set(depths[1][step : step + 3])) > 1 for step in range(0, 12, 3))


@pytest.mark.parametrize(
    ("n_steps", "wanted"),
    [
        (16, [False, True, False, False, True, False, True]),  # three turns beside the encoder, then four alone
        (17, [False, True, False, True, False, True, False, True]),
    ],
)
def test_the_gate_learns_levels_and_token_levels_in_turn(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch, n_steps: int, wanted: list[bool]
) -> None:
    turns: list[bool] = []
    losses = learner.gate_losses

    def note(*arguments: Any, settle: bool) -> Any:
        turns.append(settle)
        return losses(*arguments, settle=settle)

    monkeypatch.setattr(learner, "gate_losses", note)
    changes = {"training.num_steps": n_steps, "training.gate_steps": 4, "training.gate_every_n_steps": 4}
    for _ in Trainer(train_settings(**changes), cpu)._steps():
        pass
    assert turns == wanted
