"""That the script for a card runs where there is little but torch, and loses nothing it has found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders, gpu
from rdt_core import RDT
from service.engine import static_batch
from service.engine.types import Job
from service.process import garbage

ROOT = Path(__file__).parents[2]

ALONE = """
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "pydantic", "yaml", "grpc", "starlette", "hypothesis", "httpx"}:
            raise ModuleNotFoundError(f"{name} is not on a bare machine")

sys.meta_path.insert(0, Bare())
"""


def test_little_but_torch_is_wanted() -> None:
    runs = "import benchmarks.gpu, pytest; sys.exit(pytest.main('-c /dev/null --rootdir=. --co -q tests/gpu'.split()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(
        [sys.executable, "-c", ALONE + runs], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def options(**changes: Any) -> Namespace:
    given = {"token_budget": 80, "max_live": 8, "requests": 40, "sizes": [4], "rounds": 1, "peak": 1.0}
    return Namespace(**given | changes)


def test_a_row_says_in_how_many_ticks_the_batch_was_full(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job([2, 4, 4, 3], [False, True, True, False], 2, 0.0, "gate")] * 40
    monkeypatch.setattr(gpu, "make_jobs", lambda *_: jobs)
    monkeypatch.setattr(garbage, "freeze", lambda: None)
    row = gpu.ladder(tiny_model, gpu.Engines(tiny_model, options()), "any", options())
    assert row["requests_per_second"].keys() == {"loop", "static 4", "sorted 4", "refill", "+ lookahead"}
    assert row["full_ticks"] == pytest.approx(12 / 15, abs=1e-3), "five turns of three ticks"


def test_after_the_first_turn_batches_are_of_the_size_that_was_best(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job([2, 4, 4, 3], [False, True, True, False], 2, 0.0, "gate")] * 40
    monkeypatch.setattr(gpu, "make_jobs", lambda *_: jobs)
    monkeypatch.setattr(garbage, "freeze", lambda: None)
    row = gpu.ladder(tiny_model, gpu.Engines(tiny_model, options()), "any", options(sizes=[4, 16]))
    kinds = [name.split()[0] for name in row["requests_per_second"]]
    assert kinds.count("static") == kinds.count("sorted") == 1


def test_a_size_is_not_judged_by_its_first_batch(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card it loads kernels and allocates: batches of 4 are the best here, but for their first one."""
    took = {4: [0.5], 16: []}

    def static(_model: RDT, _jobs: list[Job], size: int) -> None:
        time.sleep(took[size].pop() if took[size] else 0.01 * size / 4)

    jobs = [Job([2, 4, 4, 3], [False, True, True, False], 2, 0.0, "gate")] * 40
    monkeypatch.setattr(gpu, "make_jobs", lambda *_: jobs)
    monkeypatch.setattr(garbage, "freeze", lambda: None)
    monkeypatch.setattr(contenders, "static", static)
    row = gpu.ladder(tiny_model, gpu.Engines(tiny_model, options()), "any", options(sizes=[4, 16]))
    assert {"static 4", "sorted 4"} <= row["requests_per_second"].keys()


def test_the_loop_counts_its_few_requests_by_their_passes(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first are twice as deep as the others: by their number the loop would seem slower than it is."""
    few = gpu.LOOP_REQUESTS
    jobs = [Job([2, 4, 4, 3], [False, True, True, False], 2 if i < few else 1, 0.0, "gate") for i in range(3 * few)]
    monkeypatch.setattr(gpu, "make_jobs", lambda *_: jobs)
    monkeypatch.setattr(gpu, "seconds", lambda run, _device: (run(), 1.0)[1])
    monkeypatch.setattr(garbage, "freeze", lambda: None)
    row = gpu.ladder(tiny_model, gpu.Engines(tiny_model, options()), "any", options())
    assert row["requests_per_second"]["loop"] == 2 * few / (4 / 3)
    assert row["requests_per_second"]["static 4"] == 3 * few


JOBS = [Job([2, 5 + i, 4, 4, 3], [False, False, True, True, False], 1 + i, 0.0, "gate") for i in range(4)]


def test_the_engine_answers_in_the_order_of_the_requests(tiny_model: RDT) -> None:
    """The first ends last, and only two fit into a tick."""
    jobs = JOBS[::-1]
    results = contenders.serve(gpu.EagerBackend(tiny_model), jobs, token_budget=10, max_live=2)
    assert [(one.tokens, one.steps) for one in results] == [
        (one.tokens, one.steps) for one in (contenders.restored(tiny_model, job) for job in jobs)
    ]


def test_agreement_counts_requests_passes_and_masked_tokens(tiny_model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(_backend: Any, jobs: list[Job], *_: int) -> list[Any]:
        """One request has another token, and one a pass more."""
        one, other, *same = (contenders.restored(tiny_model, job) for job in jobs)
        changed = [token + (row == 2) for row, token in enumerate(one.tokens)]
        return [replace(one, tokens=changed), replace(other, steps=other.steps + 1), *same]

    monkeypatch.setattr(gpu, "make_jobs", lambda *_, **__: JOBS)
    monkeypatch.setattr(gpu, "FORMATS", {"cpu": ()})
    monkeypatch.setattr(contenders, "serve", serve)
    (row,) = gpu.agreement(tiny_model, options(device="cpu", agreement=4))
    assert row == {
        "precision": "fp32",
        "requests": 4,
        "same_tokens_and_steps": 0.5,
        "same_steps": 0.75,
        "masked_tokens_changed": 1 / 8,
    }


def test_passes_that_are_not_captured_are_launched_as_captured_ones(
    tiny_model: RDT, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(static_batch, "one_pass", lambda _model, _buffers, bucket: launched.append(bucket.longest))
    buffers = static_batch.Buffers.of(tiny_model, 64, 9)
    bucket = static_batch.lay_out(buffers, [5, 7], static_batch.Size(64, 9))
    gpu.AsCaptured(tiny_model)(buffers, bucket)
    assert launched == [tiny_model.config.max_seq_len]


def program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path: Path) -> None:
    """The Python of this test fails for everything to do with `base`, after it has said something."""
    python = program(tmp_path / "python", 'echo "$*"', 'case "$*" in *"--models base"*) exit 1;; esac')
    environment = os.environ | {"PYTHON": python, "OUT": str(tmp_path / "out")}
    found = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rounds", "1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout.endswith("failed or not finished: ladder-base\n")
    said = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert "--models base" in said["ladder-base"]
    assert all(said[name].endswith("--rounds 1\n") for name in said if name.startswith(("agreement", "ladder")))
    assert {"machine", "tests", "agreement", "ladder-rdt-small", "ladder-large", "training"} < set(said)
    assert len(said) <= 8


def test_without_a_card_nothing_is_measured(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    found = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["machine.log"]
    assert found.stdout.endswith("torch finds no card: nothing is measured\n")


def test_all_parts_together_take_less_than_eight_minutes_whatever_they_do(tmp_path: Path) -> None:
    """One that does not end when it is asked to is killed some seconds later: they count, too."""
    program(tmp_path / "timeout", f'echo "$*" >> {tmp_path}/asked')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh")], env=environment, capture_output=True, check=True)
    asked = (tmp_path / "asked").read_text(encoding="utf-8")
    limits = re.findall(r"-k (\d+) (\d+) ", asked)
    assert len(limits) == asked.count("--foreground") == 7
    assert sum(int(number) for pair in limits for number in pair) < 480


def test_ctrl_c_ends_the_part_under_way_and_the_script(tmp_path: Path) -> None:
    python = program(tmp_path / "python", 'case "$*" in *torch*) ;; *) echo begun; exec sleep 60;; esac')
    # In a background of their own, tests may ignore what Ctrl-C sends.
    command = ["env", "--default-signal=INT", "bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = os.environ | {"PYTHON": python, "OUT": str(tmp_path / "out")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        assert script.stdout is not None
        while script.stdout.readline() != "begun\n":
            pass
        os.killpg(script.pid, signal.SIGINT)
        rest, _ = script.communicate(timeout=30)
    assert (script.returncode, rest) == (130, "")
