"""`python -m benchmarks.engine`: requests a second of the engine and of its rivals, offline, same weights.

Each workload runs all contenders in turn, several rounds, and reports medians, so that a machine that
drifts drifts for all. Useful FLOP/s counts what the answers need; the matrix peak is measured in the
same run with products of the model's own shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial

import torch

from benchmarks import contenders
from benchmarks.workloads import WORKLOADS, make_jobs
from rdt_core import PRESETS, RDT, checkpoint
from service.engine.types import Job

PEAK_ROWS, PEAK_REPEATS = 512, 20


def load(name: str) -> RDT:
    """A preset with random weights, or a checkpoint."""
    if name not in PRESETS:
        return checkpoint.load(name).model
    torch.manual_seed(0)
    return RDT(PRESETS[name]).eval().requires_grad_(False)


def matrix_peak(model: RDT) -> float:
    """FLOP/s of the feed-forward product over 512 rows: what a pass could reach."""
    d_model, d_ff = model.config.d_model, model.config.d_ff
    rows, weight = torch.randn(PEAK_ROWS, d_model), torch.randn(d_ff, d_model)
    torch.nn.functional.linear(rows, weight)
    began = time.perf_counter()
    for _ in range(PEAK_REPEATS):
        torch.nn.functional.linear(rows, weight)
    return 2 * PEAK_ROWS * d_model * d_ff * PEAK_REPEATS / (time.perf_counter() - began)


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def runs_of(model: RDT, jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    runs: dict[str, Callable[[], None]] = {"loop": partial(contenders.loop, model, jobs)}
    for size in contenders.STATIC_SIZES:
        runs[f"static {size}"] = partial(contenders.static, model, jobs, size)
        runs[f"sorted {size}"] = partial(contenders.static, model, contenders.by_cost(jobs), size)
    runs["ours"] = partial(contenders.ours, model, jobs, options.token_budget, options.max_live)
    return runs


def measure(model: RDT, workload: str, options: argparse.Namespace) -> dict[str, object]:
    """All contenders on one workload: medians over rounds, ratios within a round."""
    jobs = make_jobs(workload, options.requests, model.config.vocab_size)
    runs = runs_of(model, jobs, options)
    runs["ours"]()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    peaks = []
    for _ in range(options.rounds):
        peaks.append(matrix_peak(model))
        for name, run in runs.items():
            taken[name].append(seconds(run))
    median = {name: statistics.median(times) for name, times in taken.items()}
    best = {
        kind: min((n for n in median if n.startswith(kind)), key=median.__getitem__) for kind in ("static", "sorted")
    }
    useful = contenders.useful_flops(model, jobs)
    size = int(best["static"].split()[1])
    rivals = {"loop": "loop", **best}
    ratios = {
        kind: statistics.median(t / o for t, o in zip(taken[name], taken["ours"], strict=True))
        for kind, name in rivals.items()
    }
    return {
        "workload": workload,
        "requests_per_second": {name: round(len(jobs) / median[name], 2) for name in ("loop", *best.values(), "ours")},
        "ours_over": {kind: round(ratio, 2) for kind, ratio in ratios.items()},
        "useful_share_of_peak": round(useful / median["ours"] / statistics.median(peaks), 3),
        "realised_over_theoretical": round(ratios["static"] / (contenders.static_flops(model, jobs, size) / useful), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="base", help=f"a checkpoint, or random weights of {', '.join(PRESETS)}")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--max-live", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model)
    results = []
    for workload in options.workloads:
        results.append(measure(model, workload, options))
        print(results[-1], flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    print(json.dumps({"benchmark": "engine", "date": str(date.today()), "model": options.model, "machine": machine,
                      "torch": torch.__version__, "requests": options.requests, "rounds": options.rounds,
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
