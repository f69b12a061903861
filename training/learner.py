"""One step of learning: the losses of its batches, their gradients over all processes, and new weights.

Everything random in batch `k` is seeded by the run's seed and `k`. A step is the same with any number of processes,
except for the order in which its gradients are added up, which CUDA never fixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rdt_core.checkpoint import Checkpoint
from rdt_core.model import RDT
from training.config import TrainConfig
from training.data import Batch, stable_seed
from training.losses import Losses, chain_losses, gate_losses, unroll_losses
from training.mixed_precision import autocast
from training.optimise import (
    Average,
    adopt_settings,
    gate_parameters,
    make_optimizer,
    make_scheduler,
    trunk_parameters,
)
from training.processes import Processes, add_up_gradients
from training.stages import Stages

UNROLL = 3
"""The stream of randomness of depths and dropout; 1 and 2 are those of the batches."""


class TrainingDiverged(ArithmeticError):
    """A loss or a gradient is no number. The message names it and the step; that of a run, its last good checkpoint."""


class Learner:
    """A model, and what changes its weights. `step` counts the steps that are done."""

    def __init__(self, model: RDT, config: TrainConfig, stages: Stages, processes: Processes) -> None:
        self.model, self.config, self.stages, self.processes = model, config, stages, processes
        self.device = model.device
        self.optimizer = make_optimizer(model, config.training)
        self.scheduler = make_scheduler(self.optimizer, config.training, stages.n_steps)
        decay = config.training.average_decay
        self.average = None if decay is None else Average(trunk_parameters(model), decay)
        if self.average is not None and stages.n_encoder_steps == 0:
            self.average.take_over()  # that of no steps, the weights themselves
        self.step = 0
        self.learning_rate = 0.0  # of the last step
        self.stop_asked = False  # some process had been asked to stop by the last step

    def learn(self, batches: Sequence[tuple[int, Batch]], *, stop_asked: bool = False) -> Losses:
        """One step on this process's batches, each with its number. Returns the mean losses over all processes, which
        are also told if this one has been asked to stop. Raises `TrainingDiverged`, and leaves the weights as they are.
        """
        self.model.train()
        section = self.config.training
        recon = gate = torch.zeros((), device=self.device)
        for number, batch in batches:
            torch.manual_seed(stable_seed(self.config.seed, UNROLL, number))
            losses = self._losses(batch)
            self._backward(losses)
            recon, gate = recon + losses.recon.detach(), gate + losses.gate.detach()
        recon, gate = self._add_up(recon, gate, stop_asked)
        apart = trunk_parameters(self.model), gate_parameters(self.model)
        norms = [clip_grad_norm_(parameters, section.max_grad_norm) for parameters in apart]
        for what, value in (("loss", recon + gate), ("gradient", sum(norms))):
            check_finite(what, value, self.step + 1)
        self.optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        self._update_average()
        return Losses(recon, gate)

    def _backward(self, losses: Losses) -> None:
        """Add to the gradients. What has a loss of no weight gets none, so that the optimizer leaves it alone."""
        section = self.config.training
        weighted = zip((section.loss_weight_recon, section.loss_weight_gate), losses, strict=True)
        total = torch.stack([weight * loss for weight, loss in weighted if weight > 0]).sum()
        if total.requires_grad:  # there are steps without a turn of the gate
            (total / section.gradient_accumulation_steps).backward()

    def _losses(self, batch: Batch) -> Losses:
        section = self.config.training
        packing = batch.packing(self.device)
        with autocast(self.device, self.config.mixed_precision):
            if section.scheme == "chain":
                return chain_losses(self.model, batch, packing, self._draw_passes(), section)
            recon = gate = torch.zeros((), device=self.device)
            if not self.stages.is_gate_alone(self.step):
                recon = unroll_losses(self.model, batch, packing, self._draw_passes(), section)
            if (turn := self.stages.gate_turn(self.step)) is not None:
                gate = self._gate_loss(batch, turn)
            return Losses(recon, gate)

    def _draw_passes(self) -> int:
        if self.stages.is_one_pass(self.step):
            return 1
        return int(torch.randint(self.config.training.max_chain_length, ()) + 1)

    def _gate_loss(self, batch: Batch, turn: int) -> Tensor:
        """Levels and token levels in turn: a deep run without settling, then one with."""
        some = batch.first(self.config.training.gate_sequences)
        return gate_losses(self.model, some, some.packing(self.device), self.config.training, settle=turn % 2 == 1)

    def _add_up(self, recon: Tensor, gate: Tensor, stop_asked: bool) -> tuple[Tensor, Tensor]:
        """Add up the gradients, the losses, and who was asked to stop, over all processes. Returns the mean losses."""
        sums = torch.stack((recon, gate, torch.tensor(float(stop_asked), device=self.device)))
        recon, gate, n_asked = add_up_gradients(list(self.model.parameters()), sums, self.processes)
        self.stop_asked = bool(n_asked)
        n_batches = self.config.training.gradient_accumulation_steps
        return recon / n_batches, gate / n_batches

    def _update_average(self) -> None:
        """The running average follows the encoder, and replaces it once the encoder has learnt."""
        learnt_at = self.stages.n_encoder_steps
        if self.average is None or self.step > learnt_at:
            return
        self.average.update()
        if self.step == learnt_at:
            self.average.take_over()

    @property
    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, optimizer and step."""
        return {} if self.average is None else {"average": self.average.values, "averaged": self.average.has_taken_over}

    def restore(self, saved: Checkpoint) -> None:
        """Go on from this state, with the settings of this run. Raises `RuntimeError`, `ValueError`, `KeyError` or
        `TypeError` for the state of another model, or one that is damaged.
        """
        self.model.load_state_dict(saved.model_state_dict)
        self.step = int(saved.step)
        if self.average is not None:
            self.average.restore((saved.progress or {}).get("average") or self.average.parameters)
        self.optimizer.load_state_dict(saved.optimizer_state_dict or {})
        if self.average is not None and self.stages.is_gate_alone(self.step):
            self.average.take_over()  # the encoder has learnt, whatever was planned when this was saved
        adopt_settings(self.optimizer, self.model, self.config.training)
        self.scheduler = make_scheduler(self.optimizer, self.config.training, self.stages.n_steps, self.step)


def check_finite(what: str, value: float | Tensor, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(f"the {what} is not finite at step {step}")
