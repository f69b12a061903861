"""That the engine's rivals are met at their best, and that settling can be measured."""

from __future__ import annotations

import argparse

from benchmarks import contenders, engine
from benchmarks.workloads import make_jobs, settle_jobs
from rdt_core import RDT


def test_requests_that_settle_are_measured_against_the_loop_alone() -> None:
    model = RDT(vocab_size=1200, d_model=16, n_heads=2, n_encoder_layers=1, d_ff=16, max_seq_len=512).eval()
    jobs = settle_jobs(4, model.config.vocab_size)
    assert {job.halting for job in jobs} == {"settle"}
    known = contenders.with_depths(model, jobs)
    assert all(told.max_steps <= job.max_steps for told, job in zip(known, jobs, strict=True))
    weights = engine.Weights({"fp32": model}, None)
    runs = engine.runs_of(weights, jobs, known, argparse.Namespace(token_budget=512, max_live=8))
    assert set(runs) == {"loop", "ours"}, "nobody else settles"
    row = engine.figures(model, "settle", known, {name: [engine.seconds(run)] for name, run in runs.items()}, [1e9])
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
