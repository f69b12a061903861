"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rdt_core.checkpoint import Checkpoint
from rdt_core.model import RDT
from training.config import TrainingSection


def gate_parameters(model: RDT) -> list[nn.Parameter]:
    return list(model.gate.parameters())


def trunk_parameters(model: RDT) -> list[nn.Parameter]:
    """Everything but the gate. Clipped separately, so that the gate's gradient cannot shrink the encoder's."""
    gate = set(map(id, model.gate.parameters()))
    return [parameter for parameter in model.parameters() if id(parameter) not in gate]


def make_optimizer(model: RDT, section: TrainingSection) -> AdamW:
    """AdamW (Loshchilov & Hutter, 2019); matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=section.learning_rate, betas=(0.9, section.adam_beta2), fused=True)


def adopt_settings(optimizer: AdamW, model: RDT, section: TrainingSection) -> None:
    """Write this run's settings over those that were loaded with the optimizer's state."""
    for group, fresh in zip(optimizer.param_groups, make_optimizer(model, section).param_groups, strict=True):
        group.update(fresh)  # with the same parameters


class Average:
    """A running average of weights over steps (Polyak & Juditsky, 1992), exponentially weighted."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in parameters]
        self.has_taken_over = False

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, self.parameters, 1.0 - self.decay)

    @torch.no_grad()
    def take_over(self) -> None:
        """The parameters become the average."""
        torch._foreach_copy_(self.parameters, self.values)
        self.has_taken_over = True

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.values, list(values))


def average_note(saved: Checkpoint) -> str:
    """The end of a sentence on a checkpoint whose weights have not been replaced by their average yet; else empty."""
    progress = saved.progress or {}
    averaged = progress.get("averaged", progress.get("best_of") == "gate stage")  # for older checkpoints
    left = progress.get("average") and not averaged
    return ", the weights as they stood and not their running average" if left else ""


def learning_rate_factor(section: TrainingSection, n_steps: int) -> Callable[[int], float]:
    """Step -> factor of `learning_rate`: linear warm-up, then the named schedule down to zero.

    The last `gate_steps`, when the gate learns alone, have a linear schedule of their own.
    """
    n_steps -= section.gate_steps
    warmup = section.n_warmup_steps(n_steps)
    decay = max(1, round(section.decay_ratio * n_steps))

    def factor(step: int) -> float:
        if step >= n_steps and section.gate_steps:
            return max(0.0, 1.0 - (step - n_steps) / section.gate_steps)
        if step < warmup:
            return (step + 1) / warmup
        if section.scheduler == "warmup_stable_decay":
            return min(1.0, max(0, n_steps - step) / decay)
        done = min(1.0, (step - warmup) / max(1, n_steps - warmup))
        return 1.0 - done if section.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


def make_scheduler(optimizer: torch.optim.Optimizer, section: TrainingSection, n_steps: int, step: int = 0) -> LambdaLR:
    """The schedule after `step` steps; depends on the step alone, so a resumed run may have a longer end."""
    for group in optimizer.param_groups:
        group["initial_lr"] = section.learning_rate
    return LambdaLR(optimizer, learning_rate_factor(section, n_steps), last_epoch=step - 1)
