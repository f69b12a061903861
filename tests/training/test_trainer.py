from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rdt_core import checkpoint, restore
from rdt_core.checkpoint import Checkpoint, export_release
from tests.training.conftest import Settings, saved_at
from training import trainer as trainer_module
from training.config import ConfigError, TrainConfig
from training.corpus import Corpus, load_corpora
from training.learner import Learner
from training.losses import Losses
from training.optimise import trunk_parameters
from training.progress import Progress
from training.trainer import Trainer
from training.validation import Validation

RUNS = {
    "unroll with dropout": {"model.dropout": 0.2},
    "chain": {"training.scheme": "chain"},
    "accumulation": {"model.dropout": 0.2, "training.gradient_accumulation_steps": 2},
    "average": {"training.average_decay": 0.7, "training.gate_steps": 2},
    "one pass first": {"training.one_pass_steps": 3, "training.scheduler": "warmup_stable_decay"},
}


def assert_same(first: Any, second: Any) -> None:
    """Equal bit for bit, however nested."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT while that step is logged."""
    log = Trainer._log

    def interrupt(self: Trainer, *arguments: Any) -> None:
        log(self, *arguments)
        if self.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_log", interrupt)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_an_interrupted_run_continues_bit_for_bit(
    train_settings: Settings,
    cpu: torch.device,
    tmp_path: Path,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train_settings(**changes, **{"training.save_every_n_steps": 4})
    assert Trainer(whole, cpu).fit()

    broken = train_settings(**changes, **{"output.checkpoint_dir": str(tmp_path / "broken")})
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert not Trainer(broken, cpu).fit()
    torch.manual_seed(999)
    assert Trainer(broken, cpu, resume=saved_at(broken, 4)).fit()

    expected, found = (checkpoint.read(saved_at(config, 8)) for config in (whole, broken))
    assert_same(found.model_state_dict, expected.model_state_dict)
    assert_same(found.optimizer_state_dict, expected.optimizer_state_dict)
    assert_same(found.scheduler_state_dict, expected.scheduler_state_dict)
    assert_same(found.progress, expected.progress)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process has a copy")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # about forking; lost as an error before 3.15
def test_processes_that_prepare_batches_share_the_text(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Corpus, "__reduce__", lambda _: pytest.fail("is copied"))
    assert Trainer(train_settings(**{"data.num_workers": 1}), cpu).fit()


def test_a_small_text_is_learnt(train_settings: Settings, cpu: torch.device) -> None:
    settings = {"training.num_steps": 60, "training.learning_rate": 1e-2, "training.max_chain_length": 2}
    trainer = Trainer(train_settings(**settings, **{"model.d_model": 32, "data.full_length_share": 1.0}), cpu)
    losses = [step.recon.item() for step in trainer._steps()]
    assert sum(losses[:5]) / 5 > 4
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:5]) / 5


@pytest.fixture
def finished(train_settings: Settings, cpu: torch.device) -> TrainConfig:
    """The settings of a run that has ended."""
    config = train_settings(
        **{"training.save_every_n_steps": 2, "training.keep_last_n_checkpoints": 2, "output.eval_every_n_steps": 4}
    )
    assert Trainer(config, cpu).fit()
    return config


def test_the_best_model_is_a_checkpoint_to_serve(finished: TrainConfig) -> None:
    path = Path(finished.output.checkpoint_dir) / "best_model.pt"
    loaded = checkpoint.load(path)
    assert loaded.name == finished.name
    assert loaded.model.config.total_steps == finished.training.total_steps
    assert set(loaded.model.config.suppress_tokens) == loaded.tokenizer.special_ids
    assert loaded.checkpoint.step in (4, 8)
    assert loaded.checkpoint.loss is not None
    encoding = loaded.tokenizer.encode("the [MASK] fox")
    found = restore(loaded.model, torch.tensor(encoding.ids), torch.tensor(encoding.masked))
    assert found.tokens[2] not in loaded.tokenizer.special_ids
    assert loaded.checkpoint.config["training"] == finished.to_mapping()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, (4, 2.0)),
        ({"training.gate_every_n_steps": 0}, (6, 1.5)),
        ({"training.one_pass_steps": 8}, (6, 1.5)),
    ],
    ids=["with the gate's", "of reconstruction, without", "of reconstruction, in one pass"],
)
def test_the_best_model_is_the_one_of_the_lowest_validation_loss(
    train_settings: Settings,
    cpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kept: tuple[int, float],
) -> None:
    losses = iter([(3.0, 2.0), (2.0, 3.0), (2.5, 1.5), (4.0, 4.0)])  # in all, and of reconstruction
    monkeypatch.setattr(trainer_module, "validate", lambda *_, **__: Validation(*next(losses), 0.0, 0.0, 0.0))
    config = train_settings(**changes, **{"output.eval_every_n_steps": 2})
    Trainer(config, cpu).fit()
    best = checkpoint.read(Path(config.output.checkpoint_dir) / "best_model.pt")
    assert (best.step, best.loss) == kept


def test_the_last_checkpoints_are_kept(train_settings: Settings, cpu: torch.device) -> None:
    trainer = Trainer(train_settings(**{"training.keep_last_n_checkpoints": 2}), cpu)
    for step in (8, 9, 10, 11):
        trainer.learner.step = step
        assert trainer.save() == trainer.last_saved
    names = {path.name for path in trainer.folder.path.iterdir()}
    assert names == {"checkpoint_epoch_0_step_10.pt", "checkpoint_epoch_0_step_11.pt"}


def test_a_checkpoint_before_the_first_validation_has_no_loss(train_settings: Settings, cpu: torch.device) -> None:
    assert checkpoint.read(Trainer(train_settings(), cpu).save()).loss is None


def test_the_total_that_is_logged_is_what_was_minimised(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, dict[str, float]] = {}

    def draw(_: Progress, values: dict[str, float], step: int) -> None:
        drawn.setdefault(step, {}).update(values)

    monkeypatch.setattr(Progress, "draw", draw)
    weights = {"training.loss_weight_recon": 2.0, "training.loss_weight_gate": 0.25}
    changes = {"output.log_every_n_steps": 2, "training.gate_every_n_steps": 1}
    Trainer(train_settings(**weights, **changes), cpu).fit()
    logged = {step: values for step, values in drawn.items() if "train/total_loss" in values}
    assert list(logged) == [2, 4, 6, 8]
    for values in logged.values():
        total = 2.0 * values["train/recon_loss"] + 0.25 * values["train/gate_loss"]
        assert values["train/total_loss"] == pytest.approx(total)
        assert min(values["train/recon_loss"], values["train/gate_loss"]) > 0


def test_a_loss_is_logged_as_it_was_when_last_taught(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate has turns at steps 1 and 5 and in the last three, where the encoder learns nothing any more."""
    drawn: dict[int, dict[str, float]] = {}
    shown: list[dict[str, str]] = []
    learned: dict[int, Losses] = {}
    learn = Learner.learn

    def note(learner: Learner, *arguments: Any, **more: Any) -> Losses:
        losses = learn(learner, *arguments, **more)
        learned[learner.step] = losses
        return losses

    def draw(_: Progress, values: dict[str, float], step: int) -> None:
        drawn.setdefault(step, {}).update(values)

    monkeypatch.setattr(Learner, "learn", note)
    monkeypatch.setattr(Progress, "draw", draw)
    monkeypatch.setattr(Progress, "show", lambda _, **values: shown.append(values))
    changes = {"training.num_steps": 12, "training.gate_every_n_steps": 4, "training.gate_steps": 3}
    Trainer(train_settings(**changes, **{"output.log_every_n_steps": 2}), cpu).fit()
    logged = {step: values for step, values in drawn.items() if "train/lr" in values}
    taught = {step: (values.get("train/recon_loss"), values.get("train/gate_loss")) for step, values in logged.items()}
    recon = {step: losses.recon.item() for step, losses in learned.items()}
    gate = {step: losses.gate.item() for step, losses in learned.items()}
    assert taught == {
        2: (recon[2], gate[1]),
        4: (recon[4], None),
        6: (recon[6], gate[5]),
        8: (recon[8], None),
        10: (recon[9], gate[10]),
        12: (None, gate[12]),
    }
    for step, losses in taught.items():
        assert logged[step]["train/total_loss"] == pytest.approx(sum(loss for loss in losses if loss is not None))
    assert [list(values) for values in shown] == [["recon", "gate"], ["recon"]] * 2 + [["recon", "gate"], ["gate"]]


def test_what_tensorboard_sees(finished: TrainConfig) -> None:
    events: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator(finished.output.log_dir)
    log.Reload()
    values = ("total_loss", "recon_loss", "gate_loss", "exact_match", "exact_match_one_pass")
    train = {"train/total_loss", "train/recon_loss", "train/gate_loss", "train/lr"}
    assert set(log.Tags()["scalars"]) == train | {f"val/{name}" for name in values}
    assert [event.step for event in log.Scalars("train/lr")] == list(range(1, 9))
    assert [event.step for event in log.Scalars("val/total_loss")] == [4, 8]


def test_the_bar_counts_the_steps_of_the_whole_run(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(train_settings(**{"training.num_steps": 10}), cpu, resume=saved_at(finished, 8)).fit()
    said = capsys.readouterr()
    assert "8/10 [" in said.err
    assert "10/10 [" in said.err
    assert "step 10: total_loss " in said.out


def test_another_shape_cannot_be_resumed(finished: TrainConfig, train_settings: Settings, cpu: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"step_8.pt: d_ff is 32 there and 64 here"):
        Trainer(train_settings(**{"model.d_ff": 64}), cpu, resume=saved_at(finished, 8))


def test_a_resumed_run_may_answer_by_other_defaults(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device
) -> None:
    resumed = Trainer(train_settings(**{"model.max_steps": 1}), cpu, resume=saved_at(finished, 8))
    assert resumed.model.config.max_steps == 1
    assert resumed.step == 8


def test_a_release_cannot_be_resumed(finished: TrainConfig, cpu: torch.device, tmp_path: Path) -> None:
    path, release = saved_at(finished, 8), tmp_path / "release.pt"
    export_release(path, release, name="release")
    saved = checkpoint.read(path)
    for partial in (None, replace(saved, optimizer_state_dict=None), replace(saved, progress=None)):
        if partial is not None:
            checkpoint.save(release, partial)
        with pytest.raises(ConfigError, match=r"release.pt: a release without optimizer state, nothing to resume"):
            Trainer(finished, cpu, resume=release)


def without_model(saved: Checkpoint) -> None:
    saved.config = {}


def without_a_weight(saved: Checkpoint) -> None:
    del saved.model_state_dict["inject.weight"]


@pytest.mark.parametrize("spoil", [without_model, without_a_weight])
def test_a_damaged_checkpoint_cannot_be_resumed(
    finished: TrainConfig, cpu: torch.device, tmp_path: Path, spoil: Callable[[Checkpoint], None]
) -> None:
    saved = checkpoint.read(saved_at(finished, 8))
    spoil(saved)
    checkpoint.save(tmp_path / "damaged.pt", saved)
    with pytest.raises(ValueError, match=r"damaged\.pt: "):
        Trainer(finished, cpu, resume=tmp_path / "damaged.pt")


def test_a_finished_run_can_be_given_more_steps(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device
) -> None:
    longer = train_settings(**{"training.num_steps": 10})
    trainer = Trainer(longer, cpu, resume=saved_at(finished, 8))
    assert trainer.step == 8
    saved = checkpoint.read(saved_at(finished, 8))
    kept = [saved_at(finished, step).name for step in (6, 8)]
    assert saved.loss == trainer.best_loss
    assert saved.progress == {"best_loss": trainer.best_loss, "best_of": "total", "kept": kept}
    assert math.isfinite(trainer.best_loss)
    assert trainer.fit()
    assert checkpoint.read(saved_at(longer, 10)).step == 10


def test_epochs_count_optimizer_steps(train_settings: Settings, cpu: torch.device) -> None:
    changes = {"training.num_steps": None, "training.num_epochs": 3}
    plain = Trainer(train_settings(**changes), cpu)
    assert plain.n_steps == 3 * len(plain.batches)
    halved = Trainer(train_settings(**changes, **{"training.gradient_accumulation_steps": 2}), cpu)
    assert halved.n_steps == 3 * (len(plain.batches) // 2)
    more_than_the_text = {"training.gradient_accumulation_steps": len(plain.batches) + 1}
    assert Trainer(train_settings(**changes, **more_than_the_text), cpu).n_steps == 3


def test_an_impossible_model_is_a_config_error(train_settings: Settings, cpu: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"^model\.d_model is 16: want a multiple of 2 x n_heads = 6"):
        Trainer(train_settings(**{"model.n_heads": 3}), cpu)


def test_a_checkpoint_without_an_average_begins_one(
    finished: TrainConfig, train_settings: Settings, cpu: torch.device
) -> None:
    longer = train_settings(**{"training.average_decay": 0.5, "training.num_steps": 10})
    trainer = Trainer(longer, cpu, resume=saved_at(finished, 8))
    average = trainer.learner.average
    assert average is not None
    for kept, parameter in zip(average.values, trunk_parameters(trainer.model), strict=True):
        assert torch.equal(kept, parameter)


def test_gate_steps_that_leave_nothing_for_the_encoder_are_refused(train_settings: Settings) -> None:
    for gate_steps in (4, 5):
        with pytest.raises(ConfigError, match=rf"training\.gate_steps is {gate_steps}: the run has 4 steps, want less"):
            Trainer(train_settings(**{"training.num_steps": 4, "training.gate_steps": gate_steps}), torch.device("cpu"))


def test_a_run_may_teach_the_gate_of_other_weights_and_nothing_else(
    train_settings: Settings, cpu: torch.device, tmp_path: Path
) -> None:
    before = Trainer(train_settings(**{"training.num_steps": 2, "training.average_decay": 0.5}), cpu)
    before.fit()
    changes = {"training.num_steps": 4, "training.gate_steps": 4, "training.init_from": str(before.last_saved)}
    changes |= {"training.warmup_steps": 3, "output.checkpoint_dir": str(tmp_path / "gate")}
    after = Trainer(train_settings(**changes), cpu)
    after.fit()
    theirs = before.model.state_dict()
    changed = {name for name, weight in after.model.state_dict().items() if not torch.equal(weight, theirs[name])}
    assert changed == {name for name in theirs if name.startswith("gate.")}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"training.gate_every_n_steps": 0}, "the gate will learn nothing: training.gate_steps is 0"),
        ({"training.one_pass_steps": 8}, "the gate will learn nothing: training.gate_steps is 0"),
        ({"training.loss_weight_gate": 0.0}, "the gate will learn nothing: training.loss_weight_gate is 0"),
        ({"training.scheme": "chain"}, "token levels will learn nothing"),
        ({}, None),
        ({"training.gate_every_n_steps": 0, "training.gate_steps": 2}, None),
    ],
)
def test_a_gate_that_will_learn_nothing_is_told(
    train_settings: Settings, cpu: torch.device, changes: dict[str, Any], note: str | None
) -> None:
    notes = [said for said in Trainer(train_settings(**changes), cpu).notes if "learn nothing" in said]
    assert len(notes) == (note is not None)
    assert note is None or notes[0].startswith(note)


def test_validation_on_what_is_learned_is_told(train_settings: Settings, cpu: torch.device, text_file: Path) -> None:
    trainer = Trainer(train_settings(**{"data.validation_name": str(text_file)}), cpu)
    assert f"validation is on text that is learned: {text_file.name} is in both" in trainer.notes


def test_two_splits_of_one_dataset_are_no_text_in_common(
    train_settings: Settings, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = train_settings()
    monkeypatch.setattr(trainer_module, "load_corpora", lambda _, tokenizer: load_corpora(local, tokenizer))
    trainer = Trainer(train_settings(**{"data.dataset_name": "a/hub", "data.validation_name": "a/hub"}), cpu)
    assert not [note for note in trainer.notes if "text that is learned" in note]


def test_a_validation_text_without_a_word_is_refused(
    train_settings: Settings, cpu: torch.device, tmp_path: Path, text_file: Path
) -> None:
    """There any model would be perfect: at the end of the text, and in one whose only word is hardly ever drawn."""
    ends, unknown = tmp_path / "ends.txt", tmp_path / "unknown.txt"
    ends.write_text(text_file.read_text(encoding="utf-8") + "<unk> " * 4000, encoding="utf-8")
    unknown.write_text("fox" + " <unk>" * 50_000, encoding="utf-8")
    for changes in ({"data.dataset_name": str(ends)}, {"data.validation_name": str(unknown)}):
        with pytest.raises(ConfigError, match="the validation text has no word to mask: they are too few"):
            Trainer(train_settings(**changes), cpu)
