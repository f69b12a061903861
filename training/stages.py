"""What is taught when: single passes first, then unrolls of random depths, and at the end the gate alone.

    step       0 .......... one_pass_steps ................ n_steps - gate_steps ........ n_steps
    encoder    one pass     random depths                   stays as it is
    gate       nothing      every `gate_every_n_steps`      every step

`step` is the number of a step, from 0, or how many are done: the next one has that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config import ConfigError, TrainingSection


@dataclass(frozen=True)
class Stages:
    """The stages of a run of `n_steps` optimizer steps."""

    section: TrainingSection
    n_steps: int

    @property
    def n_encoder_steps(self) -> int:
        """Steps that teach the encoder; those after them teach the gate alone."""
        return self.n_steps - self.section.gate_steps

    def is_one_pass(self, step: int) -> bool:
        return step < self.section.one_pass_steps

    def is_gate_alone(self, step: int) -> bool:
        return step >= self.n_encoder_steps

    def gate_turn(self, step: int) -> int | None:
        """Which of the gate's turns this step is, counted from 0 in its stage; None where the gate learns nothing."""
        if self.is_gate_alone(step):
            return step - self.n_encoder_steps
        unrolled, every = step - self.section.one_pass_steps, self.section.gate_every_n_steps
        if every == 0 or unrolled < 0 or unrolled % every != 0:
            return None
        return unrolled // every

    def taught(self, step: int) -> list[str]:
        """Which of the `Losses` this step has."""
        recon = [] if self.is_gate_alone(step) else ["recon"]
        gate = self.section.scheme == "chain" or self.gate_turn(step) is not None
        return [*recon, "gate"] if gate else recon

    def only_one_pass_taught(self, step: int) -> bool:
        """Whether the first `step` steps all had a single pass."""
        return step <= min(self.section.one_pass_steps, self.n_encoder_steps)

    def measure(self, step: int) -> str:
        """What the best model after `step` steps is judged by: reconstruction, and the gate once that is taught."""
        if step > self.n_encoder_steps:
            return "gate stage"
        if self.only_one_pass_taught(step):
            return "one pass"
        # A chain's gate learns other levels than validation measures.
        gate_is_taught = self.section.scheme == "unroll" and self.section.gate_every_n_steps > 0
        return "total" if gate_is_taught else "recon"

    def check(self, fresh: bool) -> list[str]:
        """Notes on what will learn nothing. Raises `ConfigError` for stages that do not fit into the run, which has
        its weights from a checkpoint if it is not `fresh`.
        """
        section, n_learning = self.section, self.n_encoder_steps
        if n_learning < 0 or (n_learning == 0 and fresh and not Path(section.init_from or "").is_file()):
            wanted = "want less, or with a checkpoint as training.init_from as many"
            raise ConfigError(
                f"training.gate_steps is {section.gate_steps}: the run has {self.n_steps} steps, {wanted}"
            )
        if 0 < n_learning <= section.n_warmup_steps(n_learning):
            key = "warmup_ratio" if section.warmup_steps is None else "warmup_steps"
            raise ConfigError(f"training.{key} is {getattr(section, key)}: that is all of the run, want less")
        if section.loss_weight_gate == 0:
            return ["the gate will learn nothing: training.loss_weight_gate is 0"]
        if section.scheme == "chain":
            return ["token levels will learn nothing: training.scheme is chain"]
        if section.gate_steps == 0 and (section.gate_every_n_steps == 0 or n_learning <= section.one_pass_steps):
            return [
                "the gate will learn nothing: training.gate_steps is 0, and training.gate_every_n_steps is 0 or all "
                "steps are training.one_pass_steps"
            ]
        return []
