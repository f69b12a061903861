"""What validation reports, against the same by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch

from rdt_core import RDT
from tests.training.conftest import Settings
from training.data import Batches
from training.losses import gate_losses
from training.processes import OneProcess
from training.trainer import Trainer
from training.validation import validate


def by_hand(model: RDT, batches: Batches, index: int, n_passes: int) -> tuple[float, float, float]:
    """Of one batch: nats a masked token after `n_passes`, exact match then, and after one pass."""
    batch = batches[index]
    packing = batch.packing(torch.device("cpu"))
    states = model.recursive_forward(batch.tokens, batch.masked, packing, n_passes)
    logits = [model.decode(state.hidden, packing)[batch.masked] for state in (states[-1], states[0])]
    targets = batch.targets[batch.masked]
    surprise = -logits[0].log_softmax(-1)[torch.arange(len(targets)), targets]
    exact = [sum((row.argmax() == target).item() for row, target in zip(one, targets, strict=True)) for one in logits]
    return surprise.mean().item(), exact[0] / len(targets), exact[1] / len(targets)


@pytest.fixture
def trainer(train_settings: Settings, cpu: torch.device) -> Trainer:
    weights = {"training.loss_weight_recon": 3.0, "training.loss_weight_gate": 0.25}
    changes = {
        "output.eval_batches": 3,
        "training.gate_sequences": 2,
        "training.max_chain_length": 3,
        "training.num_steps": 30,
    }
    trainer = Trainer(train_settings(**changes, **weights), cpu)
    for _ in trainer._steps():
        pass
    return trainer


@pytest.mark.parametrize("n_passes", [None, 1])
def test_means_over_the_batches(trainer: Trainer, cpu: torch.device, n_passes: int | None) -> None:
    model, batches, section = trainer.model, trainer.validation_batches, trainer.config.training
    found = validate(model, batches, trainer.config, n_passes=n_passes)
    with torch.no_grad():
        model.eval()
        each = torch.tensor([by_hand(model, batches, index, n_passes or 3) for index in range(3)])
        firsts = [batches[index].first(2) for index in range(3)]
        gate = [gate_losses(model, some, some.packing(cpu), section, settle=False).item() for some in firsts]
    recon, exact, exact_one_pass = each.mean(0).tolist()
    gate_loss = sum(gate) / 3
    assert found == pytest.approx((3.0 * recon + 0.25 * gate_loss, recon, gate_loss, exact, exact_one_pass), rel=1e-4)
    assert 0 < exact < 1
    assert gate_loss > 0


def test_a_batch_without_a_word_to_mask_does_not_count(trainer: Trainer) -> None:
    """As short stretches of text may be of which the tokenizer knows no word."""
    model, batches, config = trainer.model, trainer.validation_batches, trainer.config
    batch = batches[0]
    empty = batch._replace(tokens=batch.targets, masked=torch.zeros_like(batch.masked))
    one_batch = replace(config, output=replace(config.output, eval_batches=1))
    found = validate(model, cast(Batches, [empty, batch, empty]), config)
    assert found == pytest.approx(validate(model, batches, one_batch))
    assert all(map(math.isnan, validate(model, cast(Batches, [empty]), one_batch))), "nothing was measured"


def test_each_process_takes_its_share(trainer: Trainer) -> None:
    class OneOfTwo(OneProcess):
        """Adds to its own sum what the other would have sent."""

        count = 2

        def __init__(self, rank: int, sums: list[torch.Tensor]) -> None:
            self.rank, self.sums = rank, sums

        def add_up(self, values: torch.Tensor) -> torch.Tensor:
            self.sums.append(values.clone())
            return sum(self.sums[-2:], torch.zeros_like(values))

    sums: list[torch.Tensor] = []
    alone = validate(trainer.model, trainer.validation_batches, trainer.config)
    both = [
        validate(trainer.model, trainer.validation_batches, trainer.config, OneOfTwo(rank, sums)) for rank in (0, 1)
    ][-1]
    assert both == pytest.approx(alone)
    assert all(values.any() for values in sums), "two batches and one"
