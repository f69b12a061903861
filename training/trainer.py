"""A training run: text, steps, logs, validation, checkpoints and exact resume.

Batch `k` is a function of the run's seed and `k`, so weights, optimizer state and the step number are all that a
resumed run needs to continue bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rdt_core import checkpoint as checkpoints
from rdt_core.checkpoint import Checkpoint
from rdt_core.config import REQUEST_DEFAULTS, ModelConfig
from rdt_core.model import RDT
from rdt_core.tokenizer import Tokenizer
from training.compiled import compile_layers
from training.config import ConfigError, TrainConfig, can_be_made, differences
from training.corpus import is_local, load_corpora, load_tokenizer, shared_files
from training.data import Batches, stable_seed
from training.files import make_folder
from training.folder import RunFolder
from training.learner import Learner, TrainingDiverged, check_finite
from training.losses import Losses
from training.memory import OutOfMemory, enough_memory
from training.mixed_precision import autocast
from training.processes import OneProcess, Processes, share
from training.progress import Progress
from training.stages import Stages
from training.stopping import leave_signals_to_the_trainer, stop_signal
from training.validation import Validation, validate
from training.warm_start import warm_start

TRAIN, VALIDATION = 1, 2  # streams of randomness
MEASURED = (
    "seed", "data.", "training.masking_strategy", "training.max_chain_length", "training.loss_weight",
    "training.batch_size", "training.gate_passes", "training.gate_sequences", "training.gate_change_share",
    "mixed_precision", "output.eval_batches", "output.checkpoint_dir",
)  # fmt: skip
"""If one of these has changed, losses before and after cannot be compared, or `best_model.pt` is in another folder."""

AT_THE_START = ("data.tokenizer_name", "training.init_from")
"""Settings that a resumed run does not use: its checkpoint holds the tokenizer and the weights."""


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
        self.notes += self.stages.check(fresh=resumed is None)

        self.model = self._make_model(fresh=resumed is None)
        self.learner = Learner(self.model, config, self.stages, self.processes)
        self._signals: list[int] = []  # those that came to this process
        self._unlogged: dict[str, Tensor] = {}  # losses taught since they were last logged
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
        with can_be_made():
            model = RDT(model_config(self.config, self.tokenizer)).to(self.device)
        section = self.config.training
        if section.compile:
            compile_layers(model)
        if section.init_from is not None and fresh:
            self.notes.append(warm_start(model, section.init_from, self.tokenizer))
        return model

    def fit(self) -> bool:
        """Train to the last step; False if a signal ended the run early (its state is saved)."""
        with (
            Progress(self.config.output.log_dir, self.step, self.n_steps, quiet=not self.processes.first) as progress,
            stop_signal() as self._signals,
        ):
            if self.step >= self.n_steps:
                self.notes.append(f"there is nothing to do: the checkpoint is of step {self.step} of {self.n_steps}")
            for note in self.notes:
                progress.say(note)
            try:
                n, n_workers = self.config.training.batch_size, self.config.data.num_workers
                with enough_memory("training.batch_size", n, "data.max_seq_length", n_workers):
                    return self._run(progress)
            except (TrainingDiverged, OutOfMemory) as error:
                good = self.last_saved or "none was saved yet"
                raise type(error)(f"{error}; last good checkpoint: {good}") from error

    def _run(self, progress: Progress) -> bool:
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
    def step(self) -> int:
        """How many steps are done."""
        return self.learner.step

    @property
    def _must_stop(self) -> bool:
        """With one process, at once; with several, when all know of the signal."""
        return bool(self._signals) if self.processes.count == 1 else self.learner.stop_asked

    def _steps(self) -> Iterator[Losses]:
        accumulate, n_workers = self.config.training.gradient_accumulation_steps, self.config.data.num_workers
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=share(range(self.step, self.n_steps), accumulate, self.processes),
            num_workers=n_workers,
            # Forked, they share the text and start at once. From Python 3.14 on that is not the default of Linux.
            multiprocessing_context="fork" if n_workers and sys.platform == "linux" else None,
            pin_memory=self.config.data.pin_memory and self.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_trainer,
        )
        batches = iter(loader)
        try:
            while self.step < self.n_steps:
                numbers = share(range(self.step, self.step + 1), accumulate, self.processes)
                own = [(k, next(batches).to(self.device)) for k in numbers]
                yield self.learner.learn(own, stop_asked=bool(self._signals))
        finally:
            if n_workers:  # which Python would end by SIGTERM, and wait for, while a traceback keeps the iterator alive
                batches._shutdown_workers()  # type: ignore[attr-defined]

    def _due(self, every_n_steps: int | None, every_n_epochs: int) -> bool:
        return self.step % (every_n_steps or every_n_epochs * self.steps_an_epoch) == 0 or self.step == self.n_steps

    def _log(self, progress: Progress, losses: Losses) -> None:
        """Draws each loss as it was when last taught; one that has not been taught since the last point has none."""
        for name in self.stages.taught(self.step - 1):
            self._unlogged[name] = getattr(losses, name)
        if self.step % self.config.output.log_every_n_steps != 0:
            return
        section = self.config.training
        found = {name: loss.item() for name, loss in self._unlogged.items()}
        self._unlogged.clear()
        weights = {"recon": section.loss_weight_recon, "gate": section.loss_weight_gate}
        total = sum(weights[name] * loss for name, loss in found.items())
        drawn = {f"train/{name}_loss": loss for name, loss in (found | {"total": total}).items()}
        progress.draw(drawn | {"train/lr": self.learner.learning_rate}, self.step)
        progress.show(**{name: f"{loss:.3f}" for name, loss in found.items()})

    def _validate(self, progress: Progress) -> None:
        with autocast(self.device, self.config.mixed_precision):
            depth = 1 if self.stages.only_one_pass_taught(self.step) else None
            result = validate(self.model, self.validation_batches, self.config, self.processes, n_passes=depth)
        values = result._asdict()
        progress.draw({f"val/{name}": value for name, value in values.items()}, self.step)
        progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._keep_best(result)

    def _keep_best(self, result: Validation) -> None:
        measure = self.stages.measure(self.step)
        if measure != self.best_of:
            self.best_of, self.best_loss = measure, math.inf
        loss = result.recon_loss if measure in ("recon", "one pass") else result.total_loss
        check_finite("validation loss", loss, self.step)  # after the last step nothing else would notice
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
            optimizer_state_dict=self.learner.optimizer.state_dict(),
            scheduler_state_dict={"last_epoch": self.step},  # for readers: it follows from the step
            progress={"best_loss": self.best_loss, "best_of": self.best_of} | self.learner.progress,
        )

    def _restore(self, path: Path, saved: Checkpoint) -> None:
        if saved.optimizer_state_dict is None or saved.progress is None:
            raise ConfigError(f"--checkpoint {path}: a release without optimizer state, nothing to resume")
        shape, wanted = checkpoints.model_config(path, saved).to_mapping(), self.model.config.to_mapping()
        for name, value in wanted.items():
            if name not in REQUEST_DEFAULTS and shape[name] != value:
                raise ConfigError(f"--checkpoint {path}: {name} is {shape[name]!r} there and {value!r} here")
        checkpoints.check_weights(path, self.model, saved.model_state_dict)
        try:
            self.learner.restore(saved)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--checkpoint {path}: its state is of another model or damaged: {error}") from error
        changed = differences(saved.config.get("training") or {}, self.config.to_mapping())
        if unused := [name for name in AT_THE_START if changed.pop(name, None)]:
            self.notes.append(f"not used, since the checkpoint has its own: {', '.join(unused)}")
        if changed:
            told = ", ".join(f"{name} {change}" for name, change in changed.items())
            self.notes.append(f"other settings than the checkpoint's: {told}")
        if self.folder.best.is_file() and not any(name.startswith(MEASURED) for name in changed):
            self.best_loss, self.best_of = saved.progress.get("best_loss", math.inf), saved.progress.get("best_of", "")
        self.folder.take_over(path, saved)


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
