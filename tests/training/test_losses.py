from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rdt_core import RDT, ModelConfig, Packing
from rdt_core.halting import due, which_settle
from training import losses
from training.config import TrainingSection
from training.data import Batch
from training.losses import chain_losses, deep_run, gate_losses, passes_left, reconstruction, surest, unroll_losses

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config: ModelConfig) -> RDT:
    """In training mode, with a gate of strong opinions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RDT(tiny_config.with_changes(dropout=0.0, total_steps=8))
    for parameter in model.gate.parameters():
        parameter.data.mul_(4)
    return model.train()


@pytest.fixture
def batch(make_batches: Any) -> Batch:
    found = make_batches(**{"data.full_length_share": 1.0})[1]
    assert isinstance(found, Batch)
    return found


def unmasked(batch: Batch) -> Batch:
    nothing = torch.zeros_like(batch.masked)
    return batch._replace(tokens=batch.targets, masked=nothing, due_passes=torch.zeros_like(batch.due_passes))


def nats(model: RDT, hidden: torch.Tensor, packing: Packing, row: int, target: int) -> torch.Tensor:
    """What one row's token costs."""
    return -model.decode(hidden, packing)[row].log_softmax(-1)[target]


def test_reconstruction_is_the_mean_cost_of_the_named_rows(model: RDT, batch: Batch) -> None:
    packing = batch.packing(CPU)
    hidden = torch.randn(packing.n_tokens, 16)
    rows = torch.tensor([1, 5, 20])
    costs = torch.stack([nats(model, hidden, packing, row, int(batch.targets[row])) for row in (1, 5, 20)])
    torch.testing.assert_close(reconstruction(model, hidden, packing, rows, batch.targets), costs.mean())
    assert reconstruction(model, hidden, packing, rows[:0], batch.targets) == 0


@pytest.mark.parametrize(("n_passes", "supervised"), [(1, [0]), (2, [0, 1]), (4, [2, 3])])
def test_unroll_supervises_every_masked_token_in_the_last_passes(
    model: RDT, batch: Batch, n_passes: int, supervised: list[int]
) -> None:
    packing = batch.packing(CPU)
    states = model.recursive_forward(batch.tokens, batch.masked, packing, n_passes)
    costs = [
        nats(model, states[step].hidden, packing, row, int(batch.targets[row]))
        for step in supervised
        for row in batch.masked.nonzero().squeeze(1).tolist()
    ]
    loss = unroll_losses(model, batch, packing, n_passes, TrainingSection(grad_passes=2))
    torch.testing.assert_close(loss, torch.stack(costs).mean())


def test_chain_supervises_newly_revealed_tokens_and_the_place_in_the_chain(model: RDT, batch: Batch) -> None:
    packing = batch.packing(CPU)
    batch = batch._replace(start_steps=torch.tensor([1, 3, 6, 8]))
    states = model.recursive_forward(batch.tokens, batch.masked, packing, 3, 3)
    recon, gate = [], []
    for step, state in enumerate(states, start=1):
        rows = [row for row in range(packing.n_tokens) if batch.due_passes[row] == step]
        assert rows
        costs = [nats(model, state.hidden, packing, row, int(batch.targets[row])) for row in rows]
        recon.append(torch.stack(costs).mean())
        places = [max(start - step, 0) / 8 for start in (1, 3, 6, 8)]
        gate += [(level - place) ** 2 for level, place in zip(state.gate.level, places, strict=True)]
    losses = chain_losses(model, batch, packing, 3, TrainingSection(total_steps=8))
    torch.testing.assert_close(losses.recon, torch.stack(recon).mean())
    torch.testing.assert_close(losses.gate, torch.stack(gate).mean())


def test_a_pass_that_reveals_nothing_does_not_make_the_others_cheaper(model: RDT, batch: Batch) -> None:
    packing = batch.packing(CPU)
    section = TrainingSection(total_steps=8)
    short = batch._replace(due_passes=torch.where(batch.due_passes == 1, 1, 0), start_steps=torch.ones(4).long())
    one, three = (chain_losses(model, short, packing, n_passes, section) for n_passes in (1, 3))
    assert one.recon > 0
    torch.testing.assert_close(three.recon, one.recon)
    assert chain_losses(model, unmasked(batch), packing, 2, section).recon == 0, "nothing at all is a loss, too"


def test_a_single_token_that_a_pass_reveals_is_learnt(model: RDT, batch: Batch) -> None:
    packing, row = batch.packing(CPU), int(batch.masked.nonzero()[0])
    alone = batch._replace(due_passes=torch.zeros_like(batch.due_passes).index_fill(0, torch.tensor([row]), 1))
    states = model.recursive_forward(alone.tokens, alone.masked, packing, 1, 1)
    expected = nats(model, states[0].hidden, packing, row, int(batch.targets[row]))
    torch.testing.assert_close(chain_losses(model, alone, packing, 2, TrainingSection(total_steps=8)).recon, expected)


def test_passes_left_counts_down_to_the_last_change() -> None:
    guesses = torch.tensor([[1, 1, 9], [7, 1, 9], [1, 6, 9], [7, 6, 9]])
    sequences = torch.tensor([0, 0, 1])
    assert passes_left(guesses, sequences, 2, 0.02).T.tolist() == [[3, 2, 1, 0], [0, 0, 0, 0]]
    assert passes_left(guesses, sequences, 2, 0.5).T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_passes_left_of_a_sequence_without_masks_is_zero() -> None:
    guesses = torch.tensor([[5], [6]])
    assert passes_left(guesses, torch.tensor([1]), 2, 0.02).T.tolist() == [[0, 0], [1, 0]]
    assert passes_left(guesses, torch.tensor([1]), 3, 0.5).T.tolist() == [[0, 0], [1, 0], [0, 0]]


def test_a_deep_run_without_settling_is_the_plain_recursion(model: RDT, batch: Batch) -> None:
    model.eval()
    packing, rows = batch.packing(CPU), batch.masked.nonzero().squeeze(1)
    run = deep_run(model, batch, packing, 3, settle=False)
    states = model.recursive_forward(batch.tokens, batch.masked, packing, 3)
    for step, state in enumerate(states):
        assert torch.equal(run.states[step].hidden, state.hidden)
        assert torch.equal(run.guesses[step], model.decode(state.hidden, packing, rows).argmax(-1))
    assert run.open_rows.all()
    assert not run.states[-1].hidden.requires_grad


def test_a_settling_run_keeps_the_pace_and_freezes_what_is_settled(model: RDT, batch: Batch) -> None:
    model.eval().decoder_norm.weight.data.neg_()  # so that a row's guess is never what it shows
    packing, rows = batch.packing(CPU), batch.masked.nonzero().squeeze(1)
    run = deep_run(model, batch, packing, 4, settle=True)
    owners = packing.sequence_ids[rows]
    for sequence in range(packing.n_sequences):
        own = owners == sequence
        n = int(own.sum())
        assert run.open_rows[:, own].sum(1).tolist() == [n - due(n, step, 4) for step in range(4)]
    for step in range(1, 4):
        closed = ~run.open_rows[step]
        assert closed.any()
        assert torch.equal(run.guesses[step][closed], run.guesses[step - 1][closed])
        fresh = model.decode(run.states[step].hidden, packing, rows).argmax(-1)
        assert not torch.equal(fresh[closed], run.guesses[step][closed])
        shown = model.embed(run.guesses[step][closed])
        torch.testing.assert_close(run.states[step].embedded[rows[closed]], shown)
        assert (run.open_rows[step] <= run.open_rows[step - 1]).all()


def test_the_last_pass_settles_what_is_left_and_the_first_as_served(model: RDT, batch: Batch) -> None:
    packing, rows = batch.packing(CPU), batch.masked.nonzero().squeeze(1)
    state = model(model.begin(batch.tokens, batch.masked, packing), packing)
    assert surest(model, state, rows, packing, step=4, n_passes=4).all()
    first = surest(model, state, rows, packing, step=1, n_passes=4)
    levels, owners = model.token_level(state.hidden, packing, rows), packing.sequence_ids[rows]
    for sequence in range(packing.n_sequences):
        own = owners == sequence
        assert int(first[own].sum()) == due(int(own.sum()), 1, 4)
        expected = which_settle(levels[own], rows[own], due(int(own.sum()), 1, 4), 0.0)
        assert torch.equal(first[own], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settle", [True, False])
def test_the_gate_is_taught_alone_and_the_mode_is_left_as_it_was(
    model: RDT, batch: Batch, settle: bool, training: bool
) -> None:
    model.train(training)
    loss = gate_losses(model, batch, batch.packing(CPU), TrainingSection(gate_passes=3, total_steps=8), settle)
    loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert loss > 0
    assert with_gradient
    assert all(name.startswith("gate.") for name in with_gradient)
    assert ("gate.sequence.weight" in with_gradient) is not settle
    assert model.training is training


def test_the_gate_loss_is_what_its_docstring_says(model: RDT, batch: Batch) -> None:
    model.eval()
    for parameter in model.encoder.parameters():
        parameter.data.mul_(1.5)  # so that guesses change from pass to pass
    section = TrainingSection(gate_passes=4, total_steps=8, gate_change_share=0.1)
    packing, rows = batch.packing(CPU), batch.masked.nonzero().squeeze(1)
    states = model.recursive_forward(batch.tokens, batch.masked, packing, 4)
    probabilities = torch.stack([model.decode(state.hidden, packing, rows).softmax(-1) for state in states])
    sureness, guesses = probabilities.max(-1)
    left = passes_left(guesses, packing.sequence_ids[rows], packing.n_sequences, 0.1)
    assert left.any()
    expected = torch.zeros(())
    for step, state in enumerate(states):
        expected += F.binary_cross_entropy(model.token_level(state.hidden, packing, rows), 1 - sureness[step])
        expected += 8 * F.smooth_l1_loss(state.gate.level, left[step] / 8, beta=1 / 8)
    torch.testing.assert_close(gate_losses(model, batch, packing, section, settle=False), expected / 4)


def test_the_gate_loss_of_a_settling_run_is_of_the_tokens_still_open(model: RDT, batch: Batch) -> None:
    model.eval()
    packing, rows = batch.packing(CPU), batch.masked.nonzero().squeeze(1)
    run = deep_run(model, batch, packing, 4, settle=True)
    expected, n_partly_open = torch.zeros(()), 0
    for state, doubts, still_open in zip(run.states, run.doubts, run.open_rows, strict=True):
        levels = model.token_level(state.hidden, packing, rows[still_open])
        expected += F.binary_cross_entropy(levels, doubts[still_open])
        n_partly_open += int(still_open.any() and not still_open.all())
    assert n_partly_open == 3
    section = TrainingSection(gate_passes=4, total_steps=8)
    torch.testing.assert_close(gate_losses(model, batch, packing, section, settle=True), expected / 4)


def test_the_gate_loss_of_a_run_that_has_settled_early_is_that_of_its_first_passes(model: RDT, batch: Batch) -> None:
    only = torch.zeros_like(batch.masked).index_fill(0, batch.masked.nonzero()[0], True)
    alone, packing = batch._replace(masked=only), batch.packing(CPU)
    run = deep_run(model, alone, packing, 4, settle=True)
    assert run.open_rows.tolist() == [[True], [False], [False], [False]]
    one, four = (
        gate_losses(model, alone, packing, TrainingSection(gate_passes=passes), settle=True) for passes in (1, 4)
    )
    assert four > 0
    torch.testing.assert_close(four, one / 4)


@pytest.mark.parametrize("settle", [True, False])
def test_the_gate_is_taught_in_float32_whatever_the_rest_is(model: RDT, batch: Batch, settle: bool) -> None:
    section = TrainingSection(gate_passes=4, total_steps=8)
    expected = gate_losses(model, batch, batch.packing(CPU), section, settle)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate_losses(model, batch, batch.packing(CPU), section, settle), expected)


@pytest.mark.parametrize("settle", [True, False])
def test_a_batch_without_masks_costs_nothing(model: RDT, batch: Batch, settle: bool) -> None:
    clean = unmasked(batch)
    packing = clean.packing(CPU)
    of_gate = gate_losses(model, clean, packing, TrainingSection(gate_passes=3), settle)
    of_gate.backward()  # in the stage when it is all there is
    assert of_gate == 0
    assert model.training
    loss = unroll_losses(model, clean, packing, 2, TrainingSection())
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("gap", "certain"), [(200.0, 1.0), (-200.0, 0.0)])
def test_losses_stay_finite_when_the_gate_is_certain(model: RDT, batch: Batch, gap: float, certain: float) -> None:
    model.gate.token.bias.data = torch.tensor([gap, 200.0])
    rows = batch.masked.nonzero().squeeze(1)
    assert model.token_level(torch.zeros(len(batch.tokens), 16), batch.packing(CPU), rows).eq(certain).all()
    loss = gate_losses(model, batch, batch.packing(CPU), TrainingSection(gate_passes=3, total_steps=8), settle=True)
    assert math.isfinite(loss.item())


def test_more_passes_left_than_there_are_steps_are_a_level_of_one(
    model: RDT, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, found = TrainingSection(total_steps=8, gate_passes=3), []
    for left in (8.0, 99.0):
        monkeypatch.setattr(losses, "passes_left", lambda *_, left=left: torch.full((3, len(batch.start_steps)), left))
        found.append(gate_losses(model, batch, batch.packing(CPU), section, settle=False).item())
    assert found[0] == found[1]
