"""What the model learns from.

T: packed tokens   N: sequences   M: masked rows   P: passes   V: vocabulary

Two schemes:

- `unroll`: every masked token is supervised, by the mean over the last passes of a random depth. The
  gate learns apart, from a deep run: how many passes until the predictions stop changing, and for each
  masked token how likely its best guess is wrong, as the model's own probabilities say. That needs no labels.
- `chain`, the seed's: the text is masked at a random step `i` of a chain of `total_steps`; pass `k`
  must restore the tokens that step `i - k` reveals, and the gate must say `(i - k) / total_steps`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdt_core.halting import due, which_settle
from rdt_core.model import RDT, State
from rdt_core.packing import Packing
from training.config import TrainingSection
from training.data import Batch
from training.vocabulary import vocabulary_loss


class Losses(NamedTuple):
    recon: Tensor  # () nats a token
    gate: Tensor  # ()


def reconstruction(model: RDT, hidden: Tensor, packing: Packing, rows: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the rows `(M,)` against targets `(T,)`; 0 without rows."""
    features = model.features(hidden, packing, rows)
    return vocabulary_loss(features, model.embedding.weight, model.output_bias, targets[rows])


def unroll_losses(model: RDT, batch: Batch, packing: Packing, n_passes: int, section: TrainingSection) -> Tensor:
    """Reconstruction of every masked token, mean over the passes that carry a gradient."""
    rows = batch.masked.nonzero().squeeze(1)
    states = model.recursive_forward(batch.tokens, batch.masked, packing, n_passes, section.grad_passes, rows=rows)
    supervised = states[-section.grad_passes :]
    features = torch.cat([model.features(state.hidden, packing, rows) for state in supervised])
    targets = batch.targets[rows].repeat(len(supervised))
    return vocabulary_loss(features, model.embedding.weight, model.output_bias, targets)


def chain_losses(model: RDT, batch: Batch, packing: Packing, n_passes: int, section: TrainingSection) -> Losses:
    """The seed's scheme: newly revealed tokens only, and the place in the chain for the gate."""
    read = batch.masked.nonzero().squeeze(1)
    states = model.recursive_forward(batch.tokens, batch.masked, packing, n_passes, n_passes, rows=read)
    recon, gate = [], []
    for step, state in enumerate(states, start=1):
        rows = (batch.due_passes == step).nonzero().squeeze(1)
        if len(rows) > 0:  # the chains of all segments may be shorter
            recon.append(reconstruction(model, state.hidden, packing, rows, batch.targets))
        target = (batch.start_steps - step).clamp(min=0).float() / section.total_steps  # (N,)
        gate.append(F.mse_loss(state.gate.level, target))
    if not recon:
        recon.append(reconstruction(model, states[-1].hidden, packing, rows, batch.targets))
    return Losses(torch.stack(recon).mean(), torch.stack(gate).mean())


class DeepRun(NamedTuple):
    """Many passes over the same sequences, and the best guess of every masked row after each."""

    states: list[State]  # P states, `masked` as it was when the gate read them
    guesses: Tensor  # (P, M)
    doubts: Tensor  # (P, M) the probability of all tokens but the guess
    open_rows: Tensor  # (P, M) bool, rows not settled before that pass


@torch.no_grad()
def deep_run(model: RDT, batch: Batch, packing: Packing, n_passes: int, settle: bool) -> DeepRun:
    """`n_passes` over a batch; with `settle`, more of the rows become visible after each, the surest first."""
    state = model.begin(batch.tokens, batch.masked, packing)
    rows = batch.masked.nonzero().squeeze(1)
    states: list[State] = []
    guesses: list[Tensor] = []
    doubts: list[Tensor] = []
    open_rows: list[Tensor] = []
    for step in range(1, n_passes + 1):
        state = model(state, packing)
        states.append(state)
        open_rows.append(state.masked[rows])
        logits = model.decode(state.hidden, packing, rows).float()
        best, guess = logits.max(-1)
        doubts.append(-torch.expm1(best - logits.logsumexp(-1)))
        if guesses:
            guess = torch.where(open_rows[-1], guess, guesses[-1])
        guesses.append(guess)
        if settle:
            settled = surest(model, state, rows, packing, step=step, n_passes=n_passes)
            state = model.settle(state, rows[settled], guess[settled])
    return DeepRun(states, torch.stack(guesses), torch.stack(doubts), torch.stack(open_rows))


def surest(model: RDT, state: State, rows: Tensor, packing: Packing, *, step: int, n_passes: int) -> Tensor:
    """Which of `rows` settle now, at the pace alone: `rdt_core.halting.which_settle` for each sequence. `(M,)` bool."""
    token_level = model.token_level(state.hidden, packing, rows)
    sequences = packing.sequence_ids[rows]
    settled = torch.zeros_like(rows, dtype=torch.bool)
    for sequence in range(packing.n_sequences):
        own = (sequences == sequence).nonzero().squeeze(1)
        still_open = own[state.masked[rows[own]]]
        n_due = due(len(own), step, n_passes) - (len(own) - len(still_open))
        settled[still_open] = which_settle(token_level[still_open], rows[still_open], n_due, threshold=0.0)
    return settled


def gate_losses(model: RDT, batch: Batch, packing: Packing, section: TrainingSection, settle: bool) -> Tensor:
    """Teach the gate from a deep run: squared error of levels plus cross-entropy of token levels.

    With `settle` only the token levels are taught, on states in which the surer tokens have settled already, as when
    they are used. All of it is in float32, as models are served: in bfloat16, guesses that are nearly as good keep
    taking turns from pass to pass, and nothing seems to settle.
    """
    with torch.autocast(model.device.type, enabled=False):
        return _gate_losses(model, batch, packing, section, settle)


def _gate_losses(model: RDT, batch: Batch, packing: Packing, section: TrainingSection, settle: bool) -> Tensor:
    was_training = model.training
    run = deep_run(model.eval(), batch, packing, section.gate_passes, settle)
    model.train(was_training)
    rows = batch.masked.nonzero().squeeze(1)
    if len(rows) == 0:  # a zero that has gradients, as any other loss
        return torch.stack([parameter.sum() for parameter in model.gate.parameters()]).sum() * 0.0
    left = None  # (P, N)
    if not settle:
        sequences = packing.sequence_ids[rows]
        left = passes_left(run.guesses, sequences, packing.n_sequences, section.gate_change_share)
    state = model.gate.start(packing)
    loss = state.level.new_zeros(())
    for step, seen in enumerate(run.states):
        state = model.gate(seen.hidden, seen.masked, packing, state)
        still_open = run.open_rows[step]
        if still_open.any():
            token_level = model.token_level(seen.hidden, packing, rows[still_open])
            predicted = token_level.clamp(1e-6, 1 - 1e-6)
            loss = loss + cross_entropy(predicted, run.doubts[step][still_open])
        if left is not None:
            target = (left[step] / section.total_steps).clamp(max=1.0)
            loss = loss + section.total_steps * F.smooth_l1_loss(state.level, target, beta=1 / section.total_steps)
    return loss / len(run.states)


def cross_entropy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean binary cross-entropy of probabilities. torch's own refuses autocast on CUDA and raises on NaN."""
    return -(truth * predicted.log() + (1 - truth) * torch.log1p(-predicted)).mean()


def passes_left(guesses: Tensor, sequences: Tensor, n_sequences: int, change_share: float) -> Tensor:
    """Passes until at most `change_share` of a sequence's guesses differ from the final ones, and stay so.

    guesses `(P, M)`, the sequence of each `(M,)` -> `(P, N)`, 0 = the predictions have settled.
    """
    n_passes = len(guesses)
    will_change = (guesses != guesses[-1]).float()
    counts = torch.bincount(sequences, minlength=n_sequences).clamp(min=1)
    changing = will_change.new_zeros(n_passes, n_sequences).index_add_(1, sequences, will_change)
    unsettled = changing / counts > change_share  # (P, N)
    steps = torch.arange(1, n_passes + 1, device=unsettled.device)[:, None]
    last_unsettled = (unsettled * steps).amax(0)  # (N,)
    return (last_unsettled[None, :] + 1 - steps).clamp(min=0).float()
