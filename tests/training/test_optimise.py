from __future__ import annotations

import math

import pytest

from rdt_core import RDT, ModelConfig
from training.config import TrainingSection
from training.optimise import (
    gate_parameters,
    learning_rate_factor,
    make_optimizer,
    make_scheduler,
    trunk_parameters,
)


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        ("linear", {10: 1.0, 55: 0.5, 100: 0.0, 120: 0.0}),
        ("cosine", {10: 1.0, 55: 0.5, 32: 0.5 * (1 + math.cos(math.pi * 22 / 90)), 100: 0.0, 120: 0.0}),
        ("warmup_stable_decay", {10: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 100: 0.0, 120: 0.0}),
    ],
)
def test_the_learning_rate_at_key_steps(scheduler: str, factors: dict[int, float]) -> None:
    factor = learning_rate_factor(TrainingSection(scheduler=scheduler, warmup_ratio=0.1, decay_ratio=0.2), 100)
    warm_up = {0: 0.1, 4: 0.5, 9: 1.0}
    for step, expected in (warm_up | factors).items():
        assert factor(step) == pytest.approx(expected, abs=1e-12), step


def test_warmup_steps_override_the_ratio() -> None:
    factor = learning_rate_factor(TrainingSection(warmup_ratio=0.5, warmup_steps=2), 100)
    assert (factor(0), factor(1), factor(2)) == (0.5, 1.0, 1.0)


def test_no_decay_keeps_the_full_rate_for_every_step() -> None:
    section = TrainingSection(scheduler="warmup_stable_decay", warmup_ratio=0.0, decay_ratio=0.0)
    factor = learning_rate_factor(section, 100)
    assert (factor(0), factor(99)) == (1.0, 1.0)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert learning_rate_factor(TrainingSection(warmup_ratio=0.0), 100)(0) == 1.0


def test_matrices_decay_and_vectors_do_not(tiny_config: ModelConfig) -> None:
    model = RDT(tiny_config)
    decayed, spared = make_optimizer(model, TrainingSection(weight_decay=0.3, adam_beta2=0.9)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert decayed["betas"] == (0.9, 0.9)


def test_gate_and_trunk_share_no_parameter_and_leave_none_out(tiny_config: ModelConfig) -> None:
    model = RDT(tiny_config)
    gate, trunk = ({id(p) for p in parameters(model)} for parameters in (gate_parameters, trunk_parameters))
    assert not gate & trunk
    assert gate | trunk == {id(p) for p in model.parameters()}
    assert gate == {id(p) for p in model.gate.parameters()}


def test_a_scheduler_made_in_the_middle_is_where_the_schedule_is(tiny_config: ModelConfig) -> None:
    section = TrainingSection(learning_rate=2.0, warmup_steps=2, scheduler="linear")
    scheduler = make_scheduler(make_optimizer(RDT(tiny_config), section), section, n_steps=10, step=6)
    assert scheduler.get_last_lr() == [1.0, 1.0]
    assert scheduler.last_epoch == 6


def test_the_gates_own_steps_follow_the_schedule_of_the_others() -> None:
    section = TrainingSection(scheduler="linear", warmup_ratio=0.0, gate_steps=4)
    factor = learning_rate_factor(section, 14)
    assert [factor(step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert [factor(step) for step in (10, 12, 14)] == pytest.approx([1.0, 0.5, 0.0])
