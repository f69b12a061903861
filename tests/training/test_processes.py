"""Two processes do what one does: real ones, started by torchrun, that meet through gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from rdt_core import checkpoint
from tests.training.conftest import Settings
from training.config import ConfigError, TrainConfig
from training.processes import Made, OneProcess, add_up_gradients, meet, share
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
CHANGES = {
    "model.dropout": 0.2,
    "training.gradient_accumulation_steps": 3,  # uneven: two batches for the first process, one for the second
    "training.gate_every_n_steps": 2,
    "output.eval_batches": 3,
    "output.eval_every_n_steps": 4,
    "training.save_every_n_steps": 4,
}


class Second:
    """One of two, when the other has had nothing to say."""

    rank, count, first = 1, 2, False

    def device(self, wanted: torch.device) -> torch.device:
        return wanted

    def add_up(self, values: Tensor) -> Tensor:
        return values + 1

    def first_before_others(self, work: Callable[[], Made]) -> Made:
        return work()

    def close(self) -> None:
        pass


def in_two_processes(config: TrainConfig, *flags: str) -> subprocess.CompletedProcess[str]:
    path = Path(config.output.checkpoint_dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.to_mapping()))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "training", "--config", str(path), "--device", "cpu", *flags]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def curve(config: TrainConfig, name: str) -> list[float]:
    events = EventAccumulator(config.output.log_dir)
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def weights(config: TrainConfig, step: int) -> dict[str, Tensor]:
    (path,) = Path(config.output.checkpoint_dir).glob(f"checkpoint_epoch_*_step_{step}.pt")
    return checkpoint.read(path).model_state_dict


def test_one_process_takes_the_device_that_is_wanted() -> None:
    wanted = torch.device("meta")
    assert meet(wanted).device(wanted) == wanted


def test_two_processes_follow_the_curve_of_one_and_continue_its_run(
    train_settings: Settings, tmp_path: Path, cpu: torch.device
) -> None:
    one = train_settings(**CHANGES)
    assert Trainer(one, cpu).fit()

    def elsewhere(name: str, **more: str) -> TrainConfig:
        places = more | {"output.checkpoint_dir": str(tmp_path / name), "output.log_dir": str(tmp_path / name / "logs")}
        return train_settings(**CHANGES, **places)

    two = elsewhere("two", **{"data.cache_dir": str(tmp_path / "cache of two")})  # which tokenise the text themselves
    ended = in_two_processes(two)
    assert ended.returncode == 0, ended.stderr
    for name in ("train/recon_loss", "train/gate_loss", "val/total_loss", "val/exact_match"):
        expected = curve(one, name)
        assert len(expected) == {"train/recon_loss": 8, "train/gate_loss": 4}.get(name, 2)  # every second step
        assert curve(two, name) == pytest.approx(expected, abs=1e-4), name

    continued = elsewhere("continued")
    (half,) = Path(one.output.checkpoint_dir).glob("checkpoint_epoch_*_step_4.pt")
    ended = in_two_processes(continued, "--checkpoint", str(half))
    assert ended.returncode == 0, ended.stderr
    assert curve(continued, "train/recon_loss") == pytest.approx(curve(one, "train/recon_loss")[4:], abs=1e-4)
    for name, tensor in weights(one, 8).items():
        for other in (two, continued):
            torch.testing.assert_close(weights(other, 8)[name], tensor, atol=1e-4, rtol=0)


def test_what_one_process_cannot_do_is_no_traceback_of_the_other(train_settings: Settings, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    config = train_settings(**{"data.dataset_name": str(empty), "training.gradient_accumulation_steps": 2})
    ended = in_two_processes(config)
    assert ended.returncode != 0
    assert f"rdt-train: data.dataset_name is '{empty}': no text in it" in ended.stderr
    assert "[rank1]: Traceback" not in ended.stderr


@pytest.mark.parametrize(("rank", "batches"), [(0, [6, 8, 9, 11]), (1, [7, 10])])
def test_the_batches_of_a_step_are_shared_out(rank: int, batches: list[int]) -> None:
    one = OneProcess()
    assert list(share(range(2, 4), 3, one)) == [6, 7, 8, 9, 10, 11]
    two = Second()
    two.rank = rank
    assert list(share(range(2, 4), 3, two)) == batches


def test_gradients_are_added_up_and_the_missing_stay_missing() -> None:
    """`Second.add_up` adds one to every number: the other process has gradients of ones, for every parameter."""
    here, there = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    here.grad = torch.full((2, 2), 5.0)
    others = add_up_gradients([here, there], torch.tensor([1.0, 2.0]), Second())
    assert others.tolist() == [2, 3]
    assert torch.equal(here.grad, torch.full((2, 2), 6.0))
    assert there.grad is not None
    assert torch.equal(there.grad, torch.ones(3))

    class Alone(Second):
        def add_up(self, values: Tensor) -> Tensor:
            return values

    nowhere = nn.Parameter(torch.zeros(3))
    add_up_gradients([here, nowhere], torch.zeros(1), Alone())
    assert nowhere.grad is None, "no gradient, no weight decay either"


def test_a_batch_for_every_process(train_settings: Settings, cpu: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps is 1: .* at least one for each of the 2"):
        Trainer(train_settings(), cpu, processes=Second())
