"""What a run makes of a folder, a checkpoint and settings that were another's."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdt_core import checkpoint
from tests.training.conftest import Settings, saved_at
from training.config import ConfigError, TrainConfig
from training.optimise import average_note
from training.trainer import Trainer
from training.validation import validate
from training.warm_start import warm_start


@pytest.fixture
def finished(train_settings: Settings, cpu: torch.device) -> TrainConfig:
    config = train_settings(**{"training.save_every_n_steps": 4})
    Trainer(config, cpu).fit()
    return config


def test_a_second_run_in_a_folder_keeps_its_own_checkpoints_and_leaves_the_others(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"training.num_steps": 3, "training.save_every_n_steps": 1, "training.keep_last_n_checkpoints": 2}
    Trainer(train_settings(**short, seed=1), cpu).fit()
    folder = Path(finished.output.checkpoint_dir)
    steps = sorted(int(file.stem.rpartition("_")[2]) for file in folder.glob("checkpoint_*.pt"))
    assert steps == [2, 3, 4, 8]
    assert f"{folder} has checkpoints of another run: its best_model.pt, and others of the same name, " in (
        capsys.readouterr().out
    )


def test_texts_that_training_never_showed_are_told(train_settings: Settings, cpu: torch.device) -> None:
    short = Trainer(train_settings(), cpu).notes
    assert short == [
        "the server will take texts of 32 tokens (model.max_seq_len), "
        "the longest in training have 16 (data.max_seq_length)"
    ]
    assert Trainer(train_settings(**{"model.max_seq_len": 16}), cpu).notes == []


def test_only_a_runs_own_checkpoints_go(finished: TrainConfig, train_settings: Settings, cpu: torch.device) -> None:
    folder = Path(finished.output.checkpoint_dir)
    copy = folder / "checkpoint_epoch_0_step_4_good.pt"
    copy.write_bytes(saved_at(finished, 4).read_bytes())
    brief = {"training.num_steps": 3, "training.keep_last_n_checkpoints": 1, "training.save_every_n_steps": 1}
    Trainer(train_settings(**brief, seed=1), cpu).fit()
    assert saved_at(finished, 4).exists()
    assert copy.exists()

    later = folder / "checkpoint_epoch_9_step_20.pt"
    later.write_bytes(copy.read_bytes())
    more = {"training.num_steps": 10, "training.keep_last_n_checkpoints": 2}
    Trainer(train_settings(**more), cpu, resume=saved_at(finished, 8)).fit()
    assert copy.exists()
    left = {int(file.stem.rpartition("_")[2]) for file in folder.glob("checkpoint_epoch_*_step_*[0-9].pt")}
    assert left == {3, 8, 10, 20}, "resumed, it goes on where that run was, and the others are not its own"


def test_a_checkpoint_that_names_none_of_its_run_takes_none_along(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device
) -> None:
    """As those did that were saved before names were kept: which others are of its run nobody knows."""
    path = saved_at(finished, 8)
    saved = checkpoint.read(path)
    assert (saved.progress or {}).pop("kept") == [saved_at(finished, 4).name, path.name]
    checkpoint.save(path, saved)
    more = {"training.num_steps": 10, "training.keep_last_n_checkpoints": 1}
    Trainer(train_settings(**more), cpu, resume=path).fit()
    assert saved_at(finished, 4).exists()
    assert saved_at(finished, 10).exists()
    assert not path.exists()


def test_a_checkpoint_can_name_nothing_else_for_removal(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    path, other = saved_at(finished, 8), tmp_path / "checkpoint_epoch_0_step_1.pt"
    other.touch()
    saved = checkpoint.read(path)
    named = [f"../{other.name}", str(other), "best_model.pt", "."]
    checkpoint.save(path, replace(saved, progress=(saved.progress or {}) | {"kept": named}))
    more = {"training.num_steps": 10, "training.keep_last_n_checkpoints": 1, "output.eval_every_n_steps": 100}
    Trainer(train_settings(**more), cpu, resume=path).fit()
    assert other.exists()
    assert (path.parent / "best_model.pt").exists()


@pytest.mark.parametrize("gate_steps", [4, 6, 8])
def test_a_run_cut_short_for_the_gate_goes_on_with_its_average(
    train_settings: Settings, cpu: torch.device, gate_steps: int
) -> None:
    changes = {"training.average_decay": 0.5, "training.num_steps": 20, "training.save_every_n_steps": 4}
    first = Trainer(train_settings(**changes), cpu)
    for _ in zip(range(4), first._steps(), strict=False):
        pass
    saved = first.save()
    assert first.learner.average is not None
    average = [value.clone() for value in first.learner.average.values]
    changes |= {"training.num_steps": 8, "training.gate_steps": gate_steps}
    again = Trainer(train_settings(**changes), cpu, resume=saved)
    again.fit()
    assert again.learner.average is not None
    for ours, theirs in zip(again.learner.average.parameters, average, strict=True):
        assert torch.equal(ours, theirs)
    said = warm_start(again.model, saved, again.tokenizer)
    assert said.endswith("everything, the weights as they stood and not their running average")
    assert warm_start(again.model, again.folder.of_step(0, 8), again.tokenizer).endswith("everything")


def test_weights_that_stay_as_they_are_wait_for_no_average(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    alone = {"training.num_steps": 4, "training.gate_steps": 4, "training.save_every_n_steps": 2}
    start = {"training.init_from": str(saved_at(finished, 8)), "output.checkpoint_dir": str(tmp_path / "gate")}
    config = train_settings(**alone, **start, **{"training.average_decay": 0.5})
    Trainer(config, cpu).fit()
    whole = checkpoint.read(saved_at(config, 4))
    assert average_note(whole) == average_note(checkpoint.read(saved_at(config, 2))) == ""
    Trainer(config, cpu, resume=saved_at(config, 2)).fit()
    resumed = checkpoint.read(saved_at(config, 4))
    assert (resumed.progress or {})["averaged"] == (whole.progress or {})["averaged"]


def test_a_run_for_the_gate_alone_goes_on_without_the_weights_it_started_from(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    start = tmp_path / "start.pt"
    saved_at(finished, 8).rename(start)
    alone = {"training.num_steps": 4, "training.gate_steps": 4, "training.save_every_n_steps": 2}
    config = train_settings(**alone, **{"training.init_from": str(start)})
    Trainer(config, cpu).fit()
    start.unlink()
    again = Trainer(config, cpu, resume=saved_at(config, 2))
    assert again.step == 2
    assert again.fit()


@pytest.mark.parametrize(
    ("name", "value"), [("step", None), ("optimizer_state_dict", {"state": {}, "param_groups": []})]
)
def test_a_damaged_state_is_named(finished: TrainConfig, cpu: torch.device, name: str, value: object) -> None:
    path = saved_at(finished, 8)
    checkpoint.save(path, replace(checkpoint.read(path), **{name: value}))
    with pytest.raises(ConfigError, match="its state is of another model or damaged"):
        Trainer(finished, cpu, resume=path)


def test_what_a_killed_run_had_begun_to_save_is_cleared_away(finished: TrainConfig, cpu: torch.device) -> None:
    left = Path(finished.output.checkpoint_dir) / ".checkpoint_epoch_0_step_9.pt.999999999.partial"
    left.write_bytes(b"half")
    Trainer(finished, cpu, resume=saved_at(finished, 4))
    assert not left.exists()
    assert saved_at(finished, 8).exists()


def test_what_a_living_run_is_saving_is_left(finished: TrainConfig, cpu: torch.device) -> None:
    """Two runs may share a folder: one that starts must not end the other, whose file would be gone."""
    folder = Path(finished.output.checkpoint_dir)
    theirs = folder / f".best_model.pt.{os.getppid()}.partial"
    ours = folder / f".best_model.pt.{os.getpid()}.partial"  # of a container before this one, where ids begin anew
    for file in (theirs, ours):
        file.write_bytes(b"half")
    Trainer(finished, cpu, resume=saved_at(finished, 4))
    assert theirs.exists()
    assert not ours.exists()


def test_a_resumed_run_learns_as_its_settings_say(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training.learning_rate": 0.01, "training.weight_decay": 0.5, "training.adam_beta2": 0.9, "seed": 7}
    config = train_settings(**changes, **{"training.num_steps": 12, "training.scheduler": "linear"})
    trainer = Trainer(config, cpu, resume=saved_at(finished, 4))
    factor = (12 - 4) / (12 - round(0.05 * 12))
    for group, decay in zip(trainer.learner.optimizer.param_groups, (0.5, 0.0), strict=True):
        assert group["lr"] == pytest.approx(0.01 * factor)
        assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.01, decay, (0.9, 0.9))
    trainer.fit()
    said = capsys.readouterr().out
    assert "other settings than the checkpoint's: seed 0 -> 7, training.adam_beta2 0.98 -> 0.9, " in said
    assert "training.learning_rate 0.003 -> 0.01" in said


def test_what_a_resumed_run_has_from_its_checkpoint_is_not_said_to_be_used(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    changes = {"data.tokenizer_name": str(tmp_path / "none.json"), "training.init_from": str(tmp_path / "none.pt")}
    trainer = Trainer(train_settings(**changes), cpu, resume=saved_at(finished, 8))
    assert "not used, since the checkpoint has its own: data.tokenizer_name, training.init_from" in trainer.notes
    assert not [note for note in trainer.notes if "none." in note]
    assert trainer.best_loss < math.inf


def test_the_best_of_a_run_is_not_measured_by_another(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    assert Trainer(finished, cpu, resume=saved_at(finished, 8)).best_loss < math.inf
    for changes in ({"training.masking_strategy": "cosine"}, {"output.checkpoint_dir": str(tmp_path / "new")}):
        config = train_settings(**changes, **{"training.num_steps": 12})
        trainer = Trainer(config, cpu, resume=saved_at(finished, 8))
        assert trainer.best_loss == math.inf
        trainer.fit()
        best = checkpoint.read(Path(config.output.checkpoint_dir) / "best_model.pt")
        assert best.step > 8


def test_the_best_loss_is_forgotten_where_validation_finds_another(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device
) -> None:
    def resumed(**changes: object) -> tuple[float, float]:
        """What validation finds of the same weights, and the loss to do better than."""
        trainer = Trainer(train_settings(**changes), cpu, resume=saved_at(finished, 8))
        for parameter in trainer.model.encoder.parameters():
            parameter.data.mul_(4)  # so that guesses change from pass to pass
        return validate(trainer.model, trainer.validation_batches, trainer.config).total_loss, trainer.best_loss

    found, best = resumed()
    assert best < math.inf
    assert resumed(**{"training.learning_rate": 0.01, "training.grad_passes": 1}) == (found, best)
    assert resumed(**{"training.scheme": "chain"}) == (found, best)
    for name, value in {
        "seed": 1,
        "data.max_seq_length": 12,
        "training.batch_size": 2,
        "training.max_chain_length": 2,
        "training.loss_weight_gate": 0.5,
        "training.gate_passes": 5,
        "training.gate_sequences": 1,
        "training.gate_change_share": 0.9,
        "output.eval_batches": 2,
    }.items():
        other, to_beat = resumed(**{name: value})
        assert other != found, name
        assert to_beat == math.inf, name


def test_a_resumed_run_replaces_no_better_model(finished: TrainConfig, cpu: torch.device) -> None:
    path, best = saved_at(finished, 4), Path(finished.output.checkpoint_dir) / "best_model.pt"
    saved = checkpoint.read(path)
    checkpoint.save(path, replace(saved, progress={"best_loss": -1.0, "best_of": "total"}))
    checkpoint.save(best, saved)
    Trainer(finished, cpu, resume=path).fit()
    assert checkpoint.read(best).step == 4


def test_a_run_whose_best_model_is_not_there_saves_another(finished: TrainConfig, cpu: torch.device) -> None:
    """As on another machine, to which one checkpoint was brought: the same settings, an empty folder."""
    best = Path(finished.output.checkpoint_dir) / "best_model.pt"
    path = saved_at(finished, 4)
    saved = checkpoint.read(path)
    checkpoint.save(path, replace(saved, progress={"best_loss": -1.0, "best_of": "total"}))
    best.unlink()
    Trainer(finished, cpu, resume=path).fit()
    assert best.is_file()


@pytest.mark.parametrize(
    ("changes", "measures"),
    [
        ({"training.gate_every_n_steps": 0, "training.gate_steps": 3}, ["recon"] * 5 + ["gate stage"] * 3),
        ({"training.one_pass_steps": 5}, ["one pass"] * 5 + ["total"] * 3),
        ({"training.one_pass_steps": 5, "training.gate_every_n_steps": 0}, ["one pass"] * 5 + ["recon"] * 3),
        ({"training.gate_every_n_steps": 1}, ["total"] * 8),
        ({"training.scheme": "chain"}, ["recon"] * 8),  # its gate learns other levels than validation measures
    ],
)
def test_the_best_model_is_judged_by_what_is_being_taught(
    train_settings: Settings, cpu: torch.device, changes: dict[str, object], measures: list[str]
) -> None:
    trainer = Trainer(train_settings(**changes, **{"output.eval_every_n_steps": 1}), cpu)
    found, validate = [], trainer._validate

    def note(*arguments: object) -> object:
        result = validate(*arguments)  # type: ignore[arg-type]
        found.append(trainer.best_of)
        return result

    trainer._validate = note  # type: ignore[assignment,method-assign]
    trainer.fit()
    assert found == measures


def test_validation_shows_no_answers(train_settings: Settings, cpu: torch.device) -> None:
    shares = {"training.keep_token_share": 0.5, "training.random_token_share": 0.5}
    trainer = Trainer(train_settings(**shares), cpu)
    mask = trainer.tokenizer.mask_id
    batch = trainer.validation_batches[1]
    assert (batch.tokens[batch.masked] == mask).all()
    assert not (trainer.batches[1].tokens[trainer.batches[1].masked] == mask).any()


def test_a_checkpoint_of_the_end_says_that_nothing_is_left(
    finished: TrainConfig, cpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Trainer(finished, cpu, resume=saved_at(finished, 8)).fit()
    assert "there is nothing to do: the checkpoint is of step 8 of 8" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("warmup_steps", 8), ("warmup_ratio", 1.0), ("warmup_ratio", 0.95)])
def test_a_run_that_would_only_warm_up_is_refused(
    train_settings: Settings, cpu: torch.device, name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{name} is {value}: that is all of the run, want less"):
        Trainer(train_settings(**{f"training.{name}": value}), cpu)
