"""One step of learning: gradients of several batches, clipping, the running average, what is taught when."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.training.conftest import Settings
from training.config import TrainConfig
from training.data import Batch
from training.losses import chain_losses, gate_losses, unroll_losses
from training.mixed_precision import cpu_has_bfloat16, has_bfloat16
from training.optimise import gate_parameters, trunk_parameters
from training.trainer import Trainer


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16 of its own")
def test_mixed_precision_is_near_and_not_the_same(train_settings: Settings, cpu: torch.device) -> None:
    exact, mixed = (
        [losses.recon.item() for losses in Trainer(train_settings(mixed_precision=mixed), cpu)._steps()]
        for mixed in (False, True)
    )
    assert mixed == pytest.approx(exact, rel=0.02)
    assert mixed != exact


def test_the_first_weights_follow_from_the_seed_alone(train_settings: Settings, cpu: torch.device) -> None:
    same, again, other = (Trainer(train_settings(seed=seed), cpu).model.embedding.weight for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_cards_before_ampere_only_emulate_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda:1"): capability}.get)
        assert has_bfloat16(torch.device("cuda:1")) == native
    assert has_bfloat16(torch.device("cpu")) == cpu_has_bfloat16()
    assert not has_bfloat16(torch.device("meta"))


def gradient_of(config: TrainConfig, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """What one training step hands to the optimizer."""
    trainer = Trainer(config, torch.device("cpu"))
    seen: dict[str, torch.Tensor] = {}

    def step() -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.learner.optimizer.step = step  # type: ignore[method-assign, assignment]
    trainer.learner.scheduler.step = lambda: None  # type: ignore[method-assign, assignment, misc]
    trainer.learner.learn(list(enumerate(batches)))
    return seen


def test_accumulated_batches_of_as_many_masks_are_one_large_batch(train_settings: Settings) -> None:
    changes = {"training.max_chain_length": 1, "training.loss_weight_gate": 0.0, "training.max_grad_norm": 1e9}
    one, two = train_settings(**changes), train_settings(**changes, **{"training.gradient_accumulation_steps": 2})
    generator = torch.Generator().manual_seed(0)
    masked = torch.arange(32) % 16 < 5
    halves = []
    for _ in range(2):
        targets = torch.randint(5, 100, (32,), generator=generator)
        halves.append(Batch(targets, targets.masked_fill(masked, 4), masked, masked.long(), torch.ones(2), 16))
    large = Batch(*(torch.cat(parts) for parts in zip(*(half[:5] for half in halves), strict=True)), 16)
    together, apart = gradient_of(one, [large]), gradient_of(two, halves)
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-5, rtol=0)
    assert together["embedding.weight"].any()


def test_each_part_learns_by_its_own_loss_and_weight(train_settings: Settings, cpu: torch.device) -> None:
    weights = {"training.loss_weight_recon": 2.0, "training.loss_weight_gate": 0.25}
    config = train_settings(**weights, **{"training.max_grad_norm": 1e9, "training.max_chain_length": 1})
    trainer = Trainer(config, cpu)
    batch, section = trainer.batches[0], config.training
    model, some = trainer.model.train(), batch.first(section.gate_sequences)
    parts = {
        "trunk": (2.0, unroll_losses(model, batch, batch.packing(cpu), 1, section)),
        "gate": (0.25, gate_losses(model, some, some.packing(cpu), section, settle=False)),
    }
    found = gradient_of(config, [batch])
    for part, (weight, loss) in parts.items():
        names = [name for name, _ in model.named_parameters() if name.startswith("gate.") == (part == "gate")]
        of = dict(model.named_parameters())
        alone = torch.autograd.grad(loss, [of[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, alone, strict=True):
            if gradient is not None:
                torch.testing.assert_close(found[name], weight * gradient, rtol=1e-4, atol=1e-7)
        assert any(gradient is not None and gradient.any() for gradient in alone)


@pytest.mark.parametrize("scheme", ["unroll", "chain"])
@pytest.mark.parametrize(("without", "part"), [("recon", "trunk"), ("gate", "gate")])
def test_a_part_whose_loss_has_no_weight_stays_as_it_is(
    train_settings: Settings, cpu: torch.device, scheme: str, without: str, part: str
) -> None:
    """To the last bit: weight decay, too, is for what learns."""
    trainer = Trainer(train_settings(**{f"training.loss_weight_{without}": 0.0, "training.scheme": scheme}), cpu)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for losses in trainer._steps():
        assert losses.recon > 0
    changed = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("gate.") == (part == "gate")]


def test_the_scheme_says_what_the_trunk_learns_by(train_settings: Settings, cpu: torch.device) -> None:
    short = {"training.max_chain_length": 1}
    for scheme, losses in (("unroll", unroll_losses), ("chain", lambda *given: chain_losses(*given).recon)):
        config = train_settings(**short, **{"training.scheme": scheme})
        trainer = Trainer(config, cpu)
        batch = trainer.batches[0]
        wanted = losses(trainer.model.train(), batch, batch.packing(cpu), 1, config.training)
        assert trainer.learner.learn([(0, batch)]).recon.item() == pytest.approx(wanted.item())


def test_the_losses_of_a_step_are_means_over_its_batches(train_settings: Settings, cpu: torch.device) -> None:
    once, thrice = (Trainer(train_settings(**{"training.gradient_accumulation_steps": n}), cpu).learner for n in (1, 3))
    batch = Trainer(train_settings(), cpu).batches[0]
    losses, means = once.learn([(0, batch)]), thrice.learn([(0, batch)] * 3)
    assert means.recon.item() == pytest.approx(losses.recon.item())
    assert means.gate.item() == pytest.approx(losses.gate.item())
    assert losses.gate > 0


def test_gate_and_trunk_are_clipped_apart(train_settings: Settings, cpu: torch.device) -> None:
    trainer = Trainer(train_settings(**{"training.max_grad_norm": 1e-3, "training.loss_weight_gate": 1e6}), cpu)
    norms: list[float] = []

    def step() -> None:
        for part in (trunk_parameters(trainer.model), gate_parameters(trainer.model)):
            norms.append(math.hypot(*(p.grad.norm().item() for p in part if p.grad is not None)))

    trainer.learner.optimizer.step = step  # type: ignore[method-assign, assignment]
    trainer.learner.scheduler.step = lambda: None  # type: ignore[method-assign, assignment, misc]
    trainer.learner.learn([(0, trainer.batches[0])])
    assert norms == pytest.approx([1e-3, 1e-3], rel=0.01)


@pytest.mark.parametrize("gate_steps", [0, 3])
def test_the_average_of_the_weights_takes_their_place_once_the_encoder_has_learnt(
    train_settings: Settings, cpu: torch.device, gate_steps: int
) -> None:
    changes = {"training.average_decay": 0.6, "training.gate_steps": gate_steps, "training.num_steps": 8}
    averaged, plain = (
        Trainer(train_settings(**(changes | {"training.average_decay": decay})), cpu) for decay in (0.6, None)
    )
    expected = [p.detach().clone() for p in trunk_parameters(plain.model)]
    for step, _ in enumerate(zip(plain._steps(), averaged._steps(), strict=True), start=1):
        now = [p.detach() for p in trunk_parameters(plain.model)]
        if step <= 8 - gate_steps:
            expected = [0.6 * was + 0.4 * is_ for was, is_ in zip(expected, now, strict=True)]
        found = [p.detach() for p in trunk_parameters(averaged.model)]
        for ours, theirs in zip(found, now if step < 8 - gate_steps else expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_last_steps_teach_the_gate_alone(train_settings: Settings) -> None:
    trainer = Trainer(train_settings(**{"training.num_steps": 4, "training.gate_steps": 2}), torch.device("cpu"))
    weights: list[dict[str, Tensor]] = []
    for _ in trainer._steps():
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    changed = {name for name in weights[-1] if not torch.equal(weights[1][name], weights[-1][name])}
    assert changed
    assert all(name.startswith("gate.") for name in changed)


def test_a_gate_that_waits_until_the_encoder_has_learnt(train_settings: Settings, cpu: torch.device) -> None:
    changes = {"training.gate_every_n_steps": 0, "training.num_steps": 6, "training.gate_steps": 2}
    gates = [losses.gate.item() for losses in Trainer(train_settings(**changes), cpu)._steps()]
    assert [step for step, gate in enumerate(gates) if gate != 0] == [4, 5]


def test_the_learning_rate_that_is_logged_is_the_one_that_was_used(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(train_settings(**{"training.num_steps": 3, "training.scheduler": "linear"}), cpu)
    used: list[float] = []
    trainer.learner.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    logged: list[float] = []
    monkeypatch.setattr(Trainer, "_log", lambda self, *_: logged.append(self.learner.learning_rate))
    trainer.fit()
    assert logged == used
    assert len(set(used)) == 3
