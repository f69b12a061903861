from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.conftest import Settings
from training import trainer
from training.train import main


@pytest.fixture
def config_file(train_settings: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(train_settings().to_mapping()), encoding="utf-8")
    return path


def test_a_run_from_the_command_line(config_file: Path, tmp_path: Path) -> None:
    assert main(["--config", str(config_file), "--device", "cpu", "training.num_steps=2"]) == 0
    saved = list((tmp_path / "checkpoints").glob("checkpoint_*_step_2.pt"))
    assert len(saved) == 1
    resumed = ["--config", str(config_file), "--checkpoint", str(saved[0]), "--device", "cpu", "training.num_steps=3"]
    assert main(resumed) == 0
    assert list((tmp_path / "checkpoints").glob("checkpoint_*_step_3.pt"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["training.colour=red"], "training.colour is not a setting"),
        (["training.batch_size=many"], "training.batch_size is 'many'"),
        (["training.batch_size=["], "training.batch_size is '['"),
        (["model.n_heads=3"], "model.d_model is 16"),
        (["data.dataset_name=none.txt"], "no file none.txt"),
        (["data.tokenizer_name=none.json"], "data.tokenizer_name is 'none.json'"),
        (["--checkpoint", "none.pt"], "none.pt: no such file"),
        (["--override", "none.yaml"], "none.yaml: No such file"),
        (["output.checkpoint_dir=/dev/null"], "output.checkpoint_dir is '/dev/null': want a folder to write in: File"),
        (["output.checkpoint_dir=/dev/null/runs"], "output.checkpoint_dir is '/dev/null/runs': want a folder to write"),
        (["output.log_dir=/dev/null"], "output.log_dir is '/dev/null': want a folder to write in: File exists"),
        (["data.cache_dir=/dev/null"], "data.cache_dir is '/dev/null': want a folder to write in: File exists"),
        (["output.log_dir=~/logs"], "output.log_dir is '~/logs': ~ does not stand for anything here, want the path in"),
        (["training.init_from=none.pt"], "training.init_from is 'none.pt': no such file or folder"),
        (["--device", "abacus"], "--device is abacus: want auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["--config", str(config_file), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rdt-train: ")
    assert problem in printed
    assert printed.count("\n") == 1


def test_a_model_without_memory_is_one_line(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_config: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 12208800000000 bytes.")

    monkeypatch.setattr(trainer, "RDT", refuse)
    assert main(["--config", str(config_file), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "rdt-train: a model of this size cannot be made: DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 12208800000000 bytes.\n"
    )


@pytest.mark.parametrize(("count", "wanted"), [("x", "a whole number, as torchrun sets it"), ("2", "torchrun: ")])
def test_an_environment_that_is_not_torchruns(
    config_file: Path, count: str, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert main(["--config", str(config_file), "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"rdt-train: WORLD_SIZE is {count!r}: want {wanted}")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "--config", str(config_file), "--device", "cpu"]
    root = Path(__file__).parents[2]
    long_run = [*command, "training.num_steps=100000", "output.eval_every_n_steps=3"]
    with subprocess.Popen(
        long_run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root, env=dict(os.environ)
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("step 3: ") for line in process.stdout)  # notes come first
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()  # it has far to go
    assert process.returncode == 130
    last = printed.splitlines()[-1]
    assert last.startswith("stopped at step ")
    path = Path(last.partition("--checkpoint ")[2])
    assert path.is_file()
    assert path.is_relative_to(tmp_path)


def test_ctrl_c_while_libraries_load_is_no_traceback(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    command = [sys.executable, "-m", "training", "--config", str(config_file)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2], env=environment, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
