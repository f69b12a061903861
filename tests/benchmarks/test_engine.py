"""That the engine's rivals are met at their best, and that settling can be measured."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import contenders, engine, timing
from benchmarks.workloads import make_jobs, settle_jobs
from rdt_core import RDT
from rdt_core.flops import sequence_flops, unread_flops
from service.engine.types import Job


def test_requests_that_settle_are_measured_against_the_loop_alone() -> None:
    model = RDT(vocab_size=1200, d_model=16, n_heads=2, n_encoder_layers=1, d_ff=16, max_seq_len=512).eval()
    jobs = settle_jobs(4, model.config.vocab_size)
    assert {job.halting for job in jobs} == {"settle"}
    known = contenders.with_depths(model, jobs)
    assert all(told.max_steps <= job.max_steps for told, job in zip(known, jobs, strict=True))
    weights = engine.Weights({"fp32": model}, None)
    runs = engine.runs_of(weights, jobs, known, argparse.Namespace(token_budget=512, max_live=8))
    assert set(runs) == {"loop", "ours"}, "nobody else settles"
    row = engine.figures(model, "settle", known, {name: [timing.seconds(run)] for name, run in runs.items()}, [1e9])
    assert row["theoretical_over_static"] is None
    assert engine.table([row]).count("\n") == 2


def test_a_size_that_was_unlucky_once_may_still_be_the_best() -> None:
    first = {"loop": [9.0], "static 1": [5.0], "static 2": [4.0], "static 4": [6.0], "sorted 8": [3.0], "ours": [2.0]}
    assert engine.finalists(first) == {"loop", "static 1", "static 2", "sorted 8", "ours"}
    later = {name: [*first[name], 9.0, 3.0 if name == "static 1" else 8.0] for name in engine.finalists(first)}
    assert engine._best("static", {**first, **later}) == "static 1"
    assert engine._best("static", first) == "static 2"
    assert engine._best("static", {"loop": [1.0]}) is None


def test_not_to_batch_is_among_what_static_batches_are_tried_with() -> None:
    model = RDT(vocab_size=1200, d_model=16, n_heads=2, n_encoder_layers=1, d_ff=16, max_seq_len=512).eval()
    jobs = make_jobs("easy", 4, model.config.vocab_size)
    options = argparse.Namespace(token_budget=512, max_live=8)
    runs = engine.runs_of(engine.Weights({"fp32": model}, None), jobs, jobs, options)
    assert {"static 1", "sorted 1"} < set(runs)
    taken = {name: [1.0 if name == "static 1" else 2.0] for name in runs}
    row = engine.figures(model, "easy", jobs, taken, [1e9])
    assert row["ours_over"]["static 1"] == 0.5
    assert row["theoretical_over_static"] is None, "one alone wastes nothing"


def test_a_row_is_what_counting_by_hand_gives() -> None:
    """Two requests in one batch: what is padded is as long and as deep as the larger of them."""
    model = RDT(vocab_size=1200, d_model=16, n_heads=2, n_encoder_layers=1, d_ff=16, max_seq_len=512).eval()
    large, small = (Job([5] * n, [row < n // 4 for row in range(n)], n // 2, 0.0, "gate") for n in (8, 4))

    def needed(length: int, n_masked: int, steps: int) -> int:
        unread = (length - n_masked) * unread_flops(model.config)
        return sequence_flops(model.config, length, n_masked, steps) - unread

    useful = needed(8, 2, 4) + needed(4, 1, 2)
    padded = needed(8, 2, 4) + needed(8, 1, 4)
    times = {"loop": 10.0, "static 1": 5.0, "static 2": 4.0, "sorted 2": 3.0, "ours": 2.0, "ours bf16": 1.0}
    taken = {name: [time, 2 * time, 4 * time] for name, time in times.items()}
    row = engine.figures(model, "some", [small, large], taken, [useful * 2.0, useful * 1.0, useful * 0.5])
    assert row["mean_depth"] == 3
    assert row["requests_per_second"] == {"loop": 0.1, "static 2": 0.25, "sorted 2": 0.33, "ours": 0.5, "ours bf16": 1}
    assert row["first_round"]["static 1"] == 0.4
    assert row["ours_over"] == {"loop": 5, "static 2": 2, "sorted 2": 1.5, "ours bf16": 0.5}
    assert row["useful_share_of_peak"] == 0.25, "twice the first time, at the middle one of the peaks"
    assert row["theoretical_over_static"] == pytest.approx(padded / useful, abs=1e-3)
    assert row["realised_over_theoretical"] == pytest.approx(2 * useful / padded, abs=1e-3)
    cells = [cell.strip() for cell in engine.table([row]).splitlines()[-1].strip("|").split("|")]
    assert cells == [
        "some",
        "0.5",
        "5.00",
        "2.00 (of 2)",
        "1.50 (of 2)",
        "25%",
        f"{2 * useful / padded:.2f}",
        "2.00x",
        "",
    ]
    assert contenders.by_cost([large, small]) == [small, large]


def test_a_product_of_matrices_is_two_operations_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty of them in two seconds."""
    monkeypatch.setattr(timing, "seconds", lambda *_: 2.0)
    assert timing.matrix_peak(8, 16, 24, torch.bfloat16) == 20 * 2 * 8 * 16 * 24 / 2.0
