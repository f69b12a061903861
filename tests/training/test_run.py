"""`training/run.sh`: from text to tables in one line, which goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rdt_core import checkpoint
from training.config_file import load_config
from training.train import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
STAGES = ["training.one_pass_steps=4", "training.gate_steps=2", "training.gate_passes=2", "training.warmup_steps=2"]
SMALL = [
    "mixed_precision=false", "model.d_model=16", "model.n_heads=2", "model.n_encoder_layers=1", "model.d_ff=32",
    "model.gate_hidden_dim=8", "model.gate_shortlist=4", "training.batch_size=4", *STAGES, "data.max_seq_length=16",
    "data.num_workers=0", "data.pin_memory=false", "output.eval_every_n_steps=100000",
]  # fmt: skip
EVALUATED = ["--length=16", "--segments=4", "--mask-ratios=0.3", "--max-depth=2", "--budgets=2", "--mask-predict=2",
             "--ancestral=2", "--settle-passes=2", "--device=cpu"]  # fmt: skip


@pytest.fixture
def arguments(text_file: Path, tokenizer_file: Path, tmp_path: Path) -> list[str]:
    local = [f"data.dataset_name={text_file}", f"data.tokenizer_name={tokenizer_file}", f"data.cache_dir={tmp_path}"]
    config = [f"--config={CONFIGS / 'base.yaml'}", f"--override={CONFIGS / 'one-card.yaml'}", "--device=cpu"]
    return [*config, *SMALL, *local]


def run(folder: Path, text: Path, *arguments: str, limit: float = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "training" / "run.sh", folder, text, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "LIMIT": str(limit), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_a_run_goes_on_where_it_was_stopped_and_ends_with_its_tables(
    arguments: list[str], text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    written = [f"output.checkpoint_dir={folder}", f"output.log_dir={folder / 'logs'}"]
    assert main([*arguments, *written, "training.num_steps=9", "training.gate_steps=0"]) == 0
    finished = run(folder, text_file, *arguments, "training.num_steps=12", "--", *EVALUATED)
    assert finished.returncode == 0, finished.stderr
    assert "training.num_steps 9 -> 12" in finished.stdout
    assert checkpoint.load(folder / "release.pt").checkpoint.step == 12
    evaluated = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluated["segments"] == 4


def test_a_run_that_is_out_of_time_says_so_and_releases_nothing(
    arguments: list[str], text_file: Path, tmp_path: Path
) -> None:
    assert run(tmp_path / "run", text_file, *arguments, "training.num_steps=12", limit=0.05).returncode == 124
    assert not (tmp_path / "run" / "release.pt").exists()


def start_pretending(folder: Path, limit: float, **stages: str) -> subprocess.Popen[str]:
    """The script with shell commands in place of `python -m training…`, in a process group of its own."""
    python = folder / "python"
    cases = " ".join(f"*{stage}) {command};;" for stage, command in stages.items())
    python.write_text(f"#!/bin/sh\ncase $2 in {cases} esac\n", encoding="utf-8")
    python.chmod(0o755)
    return subprocess.Popen(
        [ROOT / "training" / "run.sh", folder, "test.txt", "--config=any", "any.setting=1"],
        env={**os.environ, "PYTHON": str(python), "FOLDER": str(folder), "LIMIT": str(limit or "")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run_pretending(folder: Path, limit: float, **stages: str) -> subprocess.CompletedProcess[str]:
    with start_pretending(folder, limit, **stages) as script:
        out, err = script.communicate(timeout=60)
    return subprocess.CompletedProcess(script.args, script.returncode, out, err)


def test_a_folder_may_be_called_as_one_likes(tmp_path: Path) -> None:
    """Also what YAML would take for a comment, a mapping or an end of quotes."""
    folder = tmp_path / "it's run: 'one'  #2"
    folder.mkdir()
    *_, checkpoints, logs = run_pretending(folder, 0, training="printf '%s\\n' \"$@\"").stdout.splitlines()
    output = load_config(CONFIGS / "tiny.yaml", None, [checkpoints, logs]).output
    assert (output.checkpoint_dir, output.log_dir) == (str(folder), str(folder / "logs"))


def test_the_limit_is_one_of_the_whole_run(tmp_path: Path) -> None:
    """An evaluation that began late is ended in time too: the next call has all of the limit for it."""
    stopped = run_pretending(
        tmp_path, 1, training="touch $FOLDER/checkpoint_epoch_0_step_1.pt", evaluate="exec sleep 5"
    )
    assert (tmp_path / "checkpoint_epoch_0_step_1.pt").exists()
    assert stopped.returncode == 124, stopped.stderr


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path: Path) -> None:
    """Epochs grow longer with the text, and shorter with larger batches: a later step may be in an earlier one."""
    folder = tmp_path / "a run"
    folder.mkdir()
    for name in ("7_step_200", "1_step_300", "1_step_300_copy", "0_step_30"):
        (folder / f"checkpoint_epoch_{name}.pt").touch()
    said = run_pretending(folder, 0, training='echo "$@"', release='echo "$@"').stdout
    newest = folder / "checkpoint_epoch_1_step_300.pt"
    assert said.count(f"--checkpoint {newest} ") == 2, "both to go on from and to release"


def test_time_that_is_over_is_not_forgotten_by_whoever_missed_the_signal(tmp_path: Path) -> None:
    """As Python does while it starts: it may raise where exceptions are ignored."""
    deaf = "trap '' INT; sleep 1; touch $FOLDER/checkpoint_epoch_0_step_1.pt"
    stopped = run_pretending(tmp_path, 0.5, training=deaf, release="touch $FOLDER/release.pt")
    assert (tmp_path / "checkpoint_epoch_0_step_1.pt").exists()
    assert stopped.returncode == 124, stopped.stderr
    assert not (tmp_path / "release.pt").exists()


TRAINER = """
import os, pathlib, time
from training.stopping import stop_signal
folder = pathlib.Path(os.environ["FOLDER"])
with stop_signal() as signals:
    (folder / "begun").touch()
    for _ in range(20000):
        time.sleep(0.001)
        if signals:
            time.sleep(0.5)
            (folder / "checkpoint_epoch_0_step_1.pt").touch()
            raise SystemExit(130)
"""


@pytest.mark.parametrize("limit", [0, 100])
@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGINT, os.killpg)]
)
def test_a_signal_ends_the_script_once_its_training_has_saved(
    tmp_path: Path, limit: float, number: int, send: Callable[[int, int], None]
) -> None:
    """To the script alone, as `kill` sends it, or to the whole group, as schedulers and Ctrl-C do."""
    (tmp_path / "trainer.py").write_text(TRAINER, encoding="utf-8")
    training = f"PYTHONPATH=. exec {sys.executable} $FOLDER/trainer.py"
    with start_pretending(tmp_path, limit, training=training, release="touch $FOLDER/release.pt") as script:
        while not (tmp_path / "begun").exists():
            assert script.poll() is None
            time.sleep(0.01)
        send(script.pid, number)
        assert script.wait(timeout=60) == 130
        assert (tmp_path / "checkpoint_epoch_0_step_1.pt").exists()
    assert not (tmp_path / "release.pt").exists()


def test_a_run_on_a_card_fetches_nothing_but_its_text() -> None:
    """Where a card is to be had, a hub may be out of reach."""
    data = load_config(CONFIGS / "base.yaml", CONFIGS / "one-card.yaml", []).data
    assert checkpoint.tokenizer_of(ROOT / data.tokenizer_name, checkpoint.read(ROOT / data.tokenizer_name)).vocab_size


def test_without_arguments_it_says_how_it_is_called() -> None:
    called = subprocess.run([ROOT / "training" / "run.sh"], capture_output=True, text=True, check=False)
    assert called.returncode == 2
    assert "training/run.sh FOLDER TEST_TEXT" in called.stderr


def test_the_learning_rate_falls_while_passes_are_unrolled() -> None:
    section = load_config(CONFIGS / "base.yaml", CONFIGS / "one-card.yaml", []).training
    n_encoder_steps = (section.num_steps or 0) - section.gate_steps
    assert round(section.decay_ratio * n_encoder_steps) == n_encoder_steps - section.one_pass_steps
