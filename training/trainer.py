"""The training loop: batch -> losses -> step, with logs, validation, checkpoints and exact resume.

Everything random in batch `k` is seeded by the run's seed and `k`, so weights, optimizer state and the
step number are all that a resumed run needs to continue bit for bit. A step is the same with any number
of processes, except for the order in which its gradients are added up, which CUDA never fixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from rdt_core import checkpoint as checkpoints
from rdt_core.checkpoint import Checkpoint
from rdt_core.config import REQUEST_DEFAULTS, ModelConfig
from rdt_core.model import RDT
from rdt_core.tokenizer import Tokenizer
from training.compiled import compile_layers
from training.config import ConfigError, TrainConfig, differences
from training.corpus import is_local, load_corpora, load_tokenizer, shared_files
from training.data import Batch, Batches, stable_seed
from training.files import make_folder
from training.folder import RunFolder
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
from training.processes import OneProcess, Processes, add_up_gradients, share
from training.progress import Progress
from training.stages import Stages
from training.stopping import leave_signals_to_the_trainer, stop_signal
from training.validation import Validation, validate
from training.warm_start import warm_start

TRAIN, VALIDATION, UNROLL = 1, 2, 3  # streams of randomness
MEASURED = (
    "seed", "data.", "training.masking_strategy", "training.total_steps", "training.max_chain_length",
    "training.scheme", "training.loss_weight", "training.batch_size", "training.gate_passes", "training.gate_sequences",
    "training.gate_change_share", "mixed_precision", "output.eval_batches", "output.checkpoint_dir",
)  # fmt: skip
"""If one of these has changed, losses before and after cannot be compared, or `best_model.pt` is in another folder."""

AT_THE_START = ("data.tokenizer_name", "training.init_from")
"""Settings that a resumed run does not use: its checkpoint holds the tokenizer and the weights."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the message names the step and the last good checkpoint."""


class Trainer:
    """Raises `ConfigError` for settings that do not fit the text, the tokenizer or the checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        resume: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.processes = processes or OneProcess()
        self._check_processes()
        self.folder = RunFolder(Path(config.output.checkpoint_dir), config.training.keep_last_n_checkpoints)
        if self.processes.first:
            self.folder.remove_partial_files()
            make_folder(Path(config.output.log_dir), "output.log_dir")
        self.notes: list[str] = []
        """What may surprise whoever started the run; said when it begins."""
        self._note_surprises(resume)
        if resume is None and (source := config.training.init_from) and not Path(source).exists():
            raise ConfigError(f"training.init_from is {source!r}: no such file or folder")
        resumed = None if resume is None else (resume, checkpoints.read(resume))
        if resumed is None:
            self.tokenizer = load_tokenizer(config.data.tokenizer_name)
        else:
            self.tokenizer = checkpoints.tokenizer_of(*resumed)
        self.batches, self.validation_batches = self._read_text()
        self.steps_an_epoch = max(1, len(self.batches) // config.training.gradient_accumulation_steps)
        self.n_steps = config.training.num_steps or config.training.num_epochs * self.steps_an_epoch
        self.stages = Stages(config.training, self.n_steps)
        self.notes += self.stages.check()

        self.model = self._make_model(fresh=resumed is None)
        self.optimizer = make_optimizer(self.model, config.training)
        self.scheduler = make_scheduler(self.optimizer, config.training, self.n_steps)
        decay = config.training.average_decay
        self.average = None if decay is None else Average(trunk_parameters(self.model), decay)
        self._signals: list[int] = []  # those that came to this process
        self._stopping = False  # one had come to some process by the last step
        self.step = 0
        self.learning_rate = 0.0  # of the last step
        self.best_loss, self.best_of = math.inf, ""
        self.last_saved = resume
        if resumed is not None:
            self._restore(*resumed)

    def _check_processes(self) -> None:
        accumulate = self.config.training.gradient_accumulation_steps
        if accumulate < self.processes.count:
            raise ConfigError(
                f"training.gradient_accumulation_steps is {accumulate}: a step's batches are shared out, want at least "
                f"one for each of the {self.processes.count} processes"
            )

    def _note_surprises(self, resume: Path | None) -> None:
        """Notes that follow from the settings alone."""
        model, data = self.config.model, self.config.data
        if resume is None and self.folder.is_used():
            self.notes.append(
                f"{self.folder.path} has checkpoints of another run: its best_model.pt, and others of the same name, "
                "will be replaced; to go on with that run, give --checkpoint"
            )
        if model.max_seq_len > data.max_seq_length:
            self.notes.append(
                f"the server will take texts of {model.max_seq_len} tokens (model.max_seq_len), "
                f"the longest in training have {data.max_seq_length} (data.max_seq_length)"
            )

    def _read_text(self) -> tuple[Batches, Batches]:
        """Batches to learn from, and to validate on."""
        config, held_out = self.config, self.config.data.validation_name
        train, validation = self.processes.first_before_others(lambda: load_corpora(config, self.tokenizer))
        if held_out and is_local(held_out) and (shared := shared_files(config.data.dataset_name, held_out)):
            self.notes.append(f"validation is on text that is learned: {', '.join(shared)} is in both")
        # In validation every masked token shows [MASK]: a kept one would give the answer, a replaced one is no gap.
        all_masked = replace(config, training=replace(config.training, random_token_share=0.0, keep_token_share=0.0))
        measured = Batches(validation, all_masked, self.tokenizer, stable_seed(config.seed, VALIDATION))
        if not any(measured[index].masked.any() for index in range(config.output.eval_batches)):
            raise ConfigError("the validation text has no word to mask: they are too few, or all unknown")
        return Batches(train, config, self.tokenizer, stable_seed(config.seed, TRAIN)), measured

    def _make_model(self, fresh: bool) -> RDT:
        """The model with its first weights; if not `fresh`, those of a checkpoint will replace them."""
        torch.manual_seed(stable_seed(self.config.seed))
        model = RDT(model_config(self.config, self.tokenizer)).to(self.device)
        section = self.config.training
        if section.compile:
            compile_layers(model)
        if section.init_from is not None and fresh:
            self.notes.append(warm_start(model, section.init_from, self.tokenizer))
        return model

    def fit(self) -> bool:
        """Train to the last step; False if a signal ended the run early (its state is saved)."""
        quiet = not self.processes.first
        with (
            Progress(self.config.output.log_dir, self.step, self.n_steps, quiet=quiet) as progress,
            stop_signal() as self._signals,
        ):
            if self.step >= self.n_steps:
                self.notes.append(f"there is nothing to do: the checkpoint is of step {self.step} of {self.n_steps}")
            for note in self.notes:
                progress.say(note)
            for losses in self._steps():
                progress.advance()
                self._log(progress, losses)
                if self._due(self.config.output.eval_every_n_steps, self.config.output.eval_every_n_epochs):
                    self._validate(progress)
                if self._due(self.config.training.save_every_n_steps, self.config.training.save_every_n_epochs):
                    self.save()
                if self._must_stop and self.step < self.n_steps:
                    self.save()
                    progress.say(f"stopped at step {self.step}; go on with --checkpoint {self.last_saved}")
                    return False
        return True

    @property
    def _must_stop(self) -> bool:
        """With one process, at once; with several, when all know of the signal."""
        return bool(self._signals) if self.processes.count == 1 else self._stopping

    def _steps(self) -> Iterator[Losses]:
        accumulate = self.config.training.gradient_accumulation_steps
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=share(range(self.step, self.n_steps), accumulate, self.processes),
            num_workers=self.config.data.num_workers,
            pin_memory=self.config.data.pin_memory and self.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_trainer,
        )
        batches = iter(loader)
        while self.step < self.n_steps:
            own = share(range(self.step, self.step + 1), accumulate, self.processes)
            yield self._train_step([(k, next(batches).to(self.device)) for k in own])

    def _train_step(self, batches: list[tuple[int, Batch]]) -> Losses:
        """One optimizer step on this process's batches, each with its number; `self.step` counts it."""
        self.model.train()
        section = self.config.training
        recon = gate = torch.zeros((), device=self.device)
        for number, batch in batches:
            torch.manual_seed(stable_seed(self.config.seed, UNROLL, number))
            losses = self._losses(batch)
            total = section.loss_weight_recon * losses.recon + section.loss_weight_gate * losses.gate
            (total / section.gradient_accumulation_steps).backward()
            recon, gate = recon + losses.recon.detach(), gate + losses.gate.detach()
        recon, gate = self._add_up(recon, gate)
        apart = trunk_parameters(self.model), gate_parameters(self.model)
        norms = [clip_grad_norm_(parameters, section.max_grad_norm) for parameters in apart]
        for what, value in (("loss", recon + gate), ("gradient", sum(norms))):
            self._check_finite(what, value, self.step + 1)
        self.optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        self._update_average()
        return Losses(recon, gate)

    def _check_finite(self, what: str, value: float | Tensor, step: int) -> None:
        if not math.isfinite(value):
            good = self.last_saved or "none was saved yet"
            raise TrainingDiverged(f"the {what} is not finite at step {step}; last good checkpoint: {good}")

    def _update_average(self) -> None:
        """The running average follows the encoder, and replaces it once the encoder has learnt."""
        learnt_at = self.stages.n_encoder_steps
        if self.average is None or self.step > learnt_at:
            return
        self.average.update()
        if self.step == learnt_at:
            self.average.take_over()

    def _add_up(self, recon: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the gradients, the losses, and whether a signal came, over all processes. Returns the mean losses."""
        told = torch.tensor(float(bool(self._signals)), device=self.device)
        sums = torch.stack((recon, gate, told))
        recon, gate, told = add_up_gradients(list(self.model.parameters()), sums, self.processes)
        self._stopping = bool(told)
        n_batches = self.config.training.gradient_accumulation_steps
        return recon / n_batches, gate / n_batches

    def _losses(self, batch: Batch) -> Losses:
        section = self.config.training
        packing = batch.packing(self.device)
        with autocast(self.device, self.config.mixed_precision):
            if section.scheme == "chain":
                return chain_losses(self.model, batch, packing, self._draw_passes(), section)
            turn = self.stages.gate_turn(self.step)
            none = torch.zeros((), device=self.device)
            recon = none
            if not self.stages.is_gate_alone(self.step):
                recon = unroll_losses(self.model, batch, packing, self._draw_passes(), section)
            return Losses(recon, none if turn is None else self._gate_loss(batch, turn))

    def _draw_passes(self) -> int:
        if self.stages.is_one_pass(self.step):
            return 1
        return int(torch.randint(self.config.training.max_chain_length, ()) + 1)

    def _gate_loss(self, batch: Batch, turn: int) -> Tensor:
        """Levels and token levels in turn: a deep run without settling, then one with."""
        some = batch.first(self.config.training.gate_sequences)
        return gate_losses(self.model, some, some.packing(self.device), self.config.training, settle=turn % 2 == 1)

    def _due(self, every_n_steps: int | None, every_n_epochs: int) -> bool:
        return self.step % (every_n_steps or every_n_epochs * self.steps_an_epoch) == 0 or self.step == self.n_steps

    def _log(self, progress: Progress, losses: Losses) -> None:
        if self.step % self.config.output.log_every_n_steps != 0:
            return
        section = self.config.training
        recon, gate = losses.recon.item(), losses.gate.item()
        total = section.loss_weight_recon * recon + section.loss_weight_gate * gate
        values = {"total_loss": total, "recon_loss": recon, "gate_loss": gate, "lr": self.learning_rate}
        progress.draw({f"train/{name}": value for name, value in values.items()}, self.step)
        progress.show(recon=f"{recon:.3f}", gate=f"{gate:.3f}")

    def _validate(self, progress: Progress) -> None:
        with autocast(self.device, self.config.mixed_precision):
            depth = 1 if self.stages.only_one_pass_taught(self.step) else None
            result = validate(
                self.model, self.validation_batches, self.config, self.device, self.processes, n_passes=depth
            )
        values = result._asdict()
        progress.draw({f"val/{name}": value for name, value in values.items()}, self.step)
        progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._keep_best(result)

    def _keep_best(self, result: Validation) -> None:
        measure = self.stages.measure(self.step)
        if measure != self.best_of:
            self.best_of, self.best_loss = measure, math.inf
        loss = result.recon_loss if measure in ("recon", "one pass") else result.total_loss
        self._check_finite("validation loss", loss, self.step)  # after the last step nothing else would notice
        if loss < self.best_loss:
            self.best_loss = loss
            if self.processes.first:
                checkpoints.save(self.folder.best, self._checkpoint(loss))

    def save(self) -> Path:
        """Write a checkpoint to resume from."""
        self.last_saved = path = self.folder.of_step(self._epoch, self.step)
        if self.processes.first:
            self.folder.save(self._checkpoint(self.best_loss if math.isfinite(self.best_loss) else None))
        return path

    @property
    def _epoch(self) -> int:
        return self.step // self.steps_an_epoch

    def _checkpoint(self, loss: float | None) -> Checkpoint:
        progress: dict[str, Any] = {"best_loss": self.best_loss, "best_of": self.best_of}
        if self.average is not None:
            progress |= {"average": self.average.values, "averaged": self.average.has_taken_over}
        return Checkpoint(
            model_state_dict=self.model.state_dict(),
            config={
                "name": self.config.name,
                "model": self.model.config.to_mapping(),
                "training": self.config.to_mapping(),
            },
            tokenizer=self.tokenizer.json,
            epoch=self._epoch,
            step=self.step,
            loss=loss,
            optimizer_state_dict=self.optimizer.state_dict(),
            scheduler_state_dict={"last_epoch": self.scheduler.last_epoch},  # for readers: it follows from the step
            progress=progress,
        )

    def _restore(self, path: Path, saved: Checkpoint) -> None:
        if saved.optimizer_state_dict is None or saved.progress is None:
            raise ConfigError(f"--checkpoint {path}: a release without optimizer state, nothing to resume")
        shape, wanted = checkpoints.model_config(path, saved).to_mapping(), self.model.config.to_mapping()
        for name, value in wanted.items():
            if name not in REQUEST_DEFAULTS and shape[name] != value:
                raise ConfigError(f"--checkpoint {path}: {name} is {shape[name]!r} there and {value!r} here")
        checkpoints.check_weights(path, self.model, saved.model_state_dict)
        self.model.load_state_dict(saved.model_state_dict)
        progress: dict[str, Any] = {"best_loss": math.inf, "best_of": ""} | saved.progress
        try:
            self.step = int(saved.step)
            if self.average is not None:
                self.average.restore(progress.get("average") or self.average.parameters)
            self.optimizer.load_state_dict(saved.optimizer_state_dict)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--checkpoint {path}: its state is of another model or damaged: {error}") from error
        if self.average is not None and self.stages.is_gate_alone(self.step):
            self.average.take_over()  # the encoder has learnt, whatever was planned when this was saved
        adopt_settings(self.optimizer, self.model, self.config.training)
        self.scheduler = make_scheduler(self.optimizer, self.config.training, self.n_steps, self.step)
        changed = differences(saved.config.get("training") or {}, self.config.to_mapping())
        if unused := [name for line in changed if (name := line.partition(" ")[0]) in AT_THE_START]:
            self.notes.append(f"not used, since the checkpoint has its own: {', '.join(unused)}")
        changed = [line for line in changed if line.partition(" ")[0] not in AT_THE_START]
        if changed:
            self.notes.append(f"other settings than the checkpoint's: {', '.join(changed)}")
        if self.folder.best.is_file() and not any(name.startswith(MEASURED) for name in changed):
            self.best_loss, self.best_of = progress["best_loss"], progress["best_of"]
        self.folder.take_over(path, self.step)


def model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration of the model that a run trains. Raises `ConfigError`."""
    try:
        return ModelConfig.from_mapping(
            vars(config.model)
            | {
                "vocab_size": tokenizer.vocab_size,
                "total_steps": config.training.total_steps,
                "suppress_tokens": tuple(sorted(tokenizer.special_ids)),
            }
        )
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
