"""`python -m benchmarks.engine`: requests a second of the engine and of its rivals, offline, same weights.

Each workload runs all contenders in turn, several rounds, and reports medians, so that a machine that
drifts drifts for all; of the batch sizes the two best go on after the first round. Useful FLOP/s counts what
the answers need; the matrix peak is measured in the same run with float32 products of 512 rows and the model's own
shape.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, record
from benchmarks.files import names_files
from benchmarks.options import amount, count
from benchmarks.timing import matrix_peak, seconds
from benchmarks.workloads import WORKLOADS, gate_jobs, make_jobs, settle_jobs
from rdt_core import PRESETS, RDT, Tokenizer, checkpoint
from rdt_core.precision import PRECISIONS, Precision, prepare
from service.engine.types import Job
from training.corpus import read_paragraphs

PEAK_ROWS = 512
GATE_PARAGRAPHS = 1000
BY_THE_MODEL = ("gate", "settle")
"""Workloads whose depths are not known before they have run."""

SIZED, FINALISTS = ("static", "sorted"), 2

Run = Callable[[], None]


def load(name: str) -> RDT:
    """A preset with random weights, or a checkpoint's."""
    if name not in PRESETS:
        return checkpoint.load(name).model
    torch.manual_seed(0)
    return RDT(PRESETS[name]).eval().requires_grad_(False)


@dataclass(frozen=True)
class Weights:
    """One set of weights, ready in several number formats. The rivals run in the first of them."""

    models: dict[str, RDT]
    tokenizer: Tokenizer | None

    @classmethod
    def load(cls, name: str, precisions: Sequence[Precision]) -> Weights:
        model, tokenizer = load(name), None if name in PRESETS else checkpoint.load(name).tokenizer
        return cls({precision: prepare(copy.deepcopy(model), precision) for precision in precisions}, tokenizer)

    @property
    def model(self) -> RDT:
        return next(iter(self.models.values()))

    def jobs(self, workload: str, options: argparse.Namespace) -> list[Job]:
        config = self.model.config
        if workload == "settle":
            return settle_jobs(options.requests, config.vocab_size)
        if workload != "gate":
            return make_jobs(workload, options.requests, config.vocab_size)
        if self.tokenizer is None or options.text is None:
            raise SystemExit("the gate workload needs a checkpoint (--model FILE) and a text (--text FILE)")
        try:
            paragraphs = list(islice(read_paragraphs(options.text), GATE_PARAGRAPHS))
            tokens = [token for paragraph in self.tokenizer.encode_training(paragraphs) for token in paragraph]
            return gate_jobs(tokens, options.requests, options.threshold, config.total_steps)
        except ValueError as error:
            raise SystemExit(f"--text: {error}") from error


def runs_of(weights: Weights, jobs: Sequence[Job], known: Sequence[Job], options: argparse.Namespace) -> dict[str, Run]:
    """Every contender. `known` are the jobs with their depths known beforehand, as static batches get them.

    Static batches do not settle, so where that is asked for the loop is the only rival.
    """
    runs: dict[str, Run] = {"loop": partial(contenders.loop, weights.model, jobs)}
    for size in contenders.STATIC_SIZES if jobs[0].halting == "gate" else ():
        runs[f"static {size}"] = partial(contenders.static, weights.model, known, size)
        runs[f"sorted {size}"] = partial(contenders.static, weights.model, contenders.by_cost(known), size)
    for precision, model in weights.models.items():
        name = "ours" if model is weights.model else f"ours {precision}"
        runs[name] = partial(contenders.ours, model, jobs, options.token_budget, options.max_live)
    return runs


def measure(weights: Weights, workload: str, jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one workload: medians over rounds, ratios within a round."""
    known = contenders.with_depths(weights.model, jobs) if workload in BY_THE_MODEL else jobs
    runs = runs_of(weights, jobs, known, options)
    for run in runs_of(weights, jobs[:8], known[:8], options).values():
        run()  # warm up: the first run allocates memory and compiles kernels
    taken: dict[str, list[float]] = {name: [] for name in runs}
    shape, peaks = weights.model.config, []
    for _ in range(options.rounds):
        peaks.append(matrix_peak(PEAK_ROWS, shape.d_model, shape.d_ff))
        for name, run in runs.items():
            taken[name].append(seconds(run))
        runs = {name: run for name, run in runs.items() if name in finalists(taken)}
    return figures(weights.model, workload, known, taken, peaks)


def finalists(taken: dict[str, list[float]], n_sizes: int = FINALISTS) -> set[str]:
    """Every contender, of static and sorted batches those of the sizes that were fastest in the first round."""
    by_time = sorted(taken, key=lambda name: taken[name][0])
    sized = ([name for name in by_time if name.startswith(kind)][:n_sizes] for kind in SIZED)
    return {name for name in taken if not name.startswith(SIZED)}.union(*sized)


def figures(
    model: RDT, workload: str, known: Sequence[Job], taken: dict[str, list[float]], peaks: list[float]
) -> dict[str, Any]:
    static, by_cost = _best("static", taken), _best("sorted", taken)
    names = ["loop", *filter(None, (static, by_cost)), *(name for name in taken if name.startswith("ours"))]
    ratio = {
        name: statistics.median(theirs / ours for theirs, ours in zip(taken[name], taken["ours"], strict=True))
        for name in names
    }
    useful = contenders.useful_flops(model, known)
    size = int(static.split()[1]) if static else 1
    gain = contenders.static_flops(model, known, size) / useful if size > 1 else None  # one alone wastes nothing
    return {
        "workload": workload,
        "mean_depth": round(statistics.mean(job.max_steps for job in known), 2),
        "requests_per_second": {name: round(len(known) / statistics.median(taken[name]), 2) for name in names},
        "first_round": {name: round(len(known) / times[0], 2) for name, times in taken.items()},
        "ours_over": {name: round(value, 3) for name, value in ratio.items() if name != "ours"},
        "useful_share_of_peak": round(useful / statistics.median(taken["ours"]) / statistics.median(peaks), 3),
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "theoretical_over_static": round(gain, 3) if gain else None,
        "realised_over_theoretical": round(ratio[static] / gain, 3) if static and gain else None,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown: requests a second, and ours over each rival within a round."""
    columns = ("workload", "ours, req/s", "over loop", "over static", "over sorted", "share of peak", "of theory",
               "bf16", "int8")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in results:
        over = {name.split()[0]: value for name, value in row["ours_over"].items() if not name.startswith("ours")}
        sizes = {name.split()[0]: name.split()[1] for name in row["ours_over"] if " " in name}
        faster = {name.split()[1]: 1 / value for name, value in row["ours_over"].items() if name.startswith("ours")}
        cells = [
            row["workload"],
            f"{row['requests_per_second']['ours']:.1f}",
            f"{over['loop']:.2f}",
            *(f"{over[kind]:.2f} (of {sizes[kind]})" if kind in over else "" for kind in ("static", "sorted")),
            f"{row['useful_share_of_peak']:.0%}",
            f"{realised:.2f}" if (realised := row["realised_over_theoretical"]) else "",
            *(f"{faster[name]:.2f}x" if name in faster else "" for name in ("bf16", "int8")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(kind: str, taken: dict[str, list[float]]) -> str | None:
    """The fastest of a kind among those that ran in every round; None if there is none."""
    rounds = max(map(len, taken.values()))
    names = [name for name, times in taken.items() if name.startswith(kind) and len(times) == rounds]
    return min(names, key=lambda name: statistics.median(taken[name]), default=None)


@names_files
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", default="base", help=f"a checkpoint, or random weights of {', '.join(PRESETS)}")
    parser.add_argument("--workloads", nargs="+", choices=(*WORKLOADS, *BY_THE_MODEL), default=list(WORKLOADS))
    parser.add_argument("--text", type=Path, help="a .txt or .txt.xz file, for the gate workload")
    parser.add_argument("--threshold", type=amount, default=0.1, help="of the gate workload (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16", "int8"])
    parser.add_argument("--requests", type=count, default=96)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--token-budget", type=count, default=512)
    parser.add_argument("--max-live", type=count, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = Weights.load(options.model, options.precisions)
    drawn = {workload: weights.jobs(workload, options) for workload in options.workloads}
    results = []
    for workload, jobs in drawn.items():
        results.append(measure(weights, workload, jobs, options))
        print(results[-1], flush=True)
    print(table(results))
    record.finish("engine", options, results=results)


if __name__ == "__main__":
    main()
