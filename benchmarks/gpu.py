"""`python -m benchmarks.gpu`: what a card makes of the engine, step by step, and whether its answers stay the same.

Needs torch, numpy, tokenizers and this repository. Runs on a CPU too, where it proves the program and no speed.

    agreement   2,000 mixed requests in every number format against the float32 reference loop: tokens and steps
    ladder      requests a second of the plain loop, of padded batches (in the order of arrival, and sorted, each of the
                size that was best in the first turn), and of the engine with each step added: refill by depth, looking
                a tick ahead, captured passes. All requests wait from the start, and as long as any does the batch is
                full: in `full_ticks` of the ticks. Then it empties as the deepest end
    idle        share of the time in which nothing ran on the card, of the first workload, by the profiler's beginnings
                and ends of kernels and copies
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # it is there, and nowhere else
from torch.profiler import ProfilerActivity, profile

from benchmarks import BUNDLED, contenders, record
from benchmarks.engine import finalists, load
from benchmarks.files import names_files
from benchmarks.options import count, natural
from benchmarks.timing import matrix_peak, seconds
from benchmarks.workloads import WORKLOADS, make_jobs
from rdt_core import RDT
from rdt_core.precision import Precision, prepare
from service.engine.backend import Backend
from service.engine.backends import make_backend
from service.engine.cuda_graph import CapturedPasses, can_capture
from service.engine.eager import EagerBackend
from service.engine.lookahead import LookaheadBackend
from service.engine.static_batch import Bucket, Buffers, PlainPasses
from service.process import garbage

LOOP_REQUESTS = 48
"""The loop needs no more to be measured. Each counts for as many as its passes are of all requests' mean."""
PEAK_SIZE = 8192
"""Of a large product; an eighth of it on a CPU."""
FORMATS: dict[str, tuple[Precision, ...]] = {"cuda": ("bf16", "fp16", "tf32"), "cpu": ("bf16", "int8")}
"""The format that is served by default comes first: time may be short."""


def agreement(model: RDT, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of requests with the same tokens, and the same number of passes, as the reference.

    The threshold lies in the middle of the levels, so that the gate decides on passes.
    """
    jobs = make_jobs("mixed", options.agreement, model.config.vocab_size, seed=1)
    threshold = statistics.median(contenders.restored(model, job).levels[-1] for job in jobs[:32])
    jobs = [replace(job, threshold=threshold) for job in jobs]
    alone = [contenders.restored(model, job) for job in jobs]
    n_masked = sum(len(one.rows) for one in alone)
    rows, bounds = [], (options.token_budget, options.max_live)
    for precision in (*FORMATS[options.device], "fp32"):
        served = prepare(copy.deepcopy(model), precision)
        results = contenders.serve(make_backend(served, *bounds), jobs, *bounds)
        pairs = list(zip(results, alone, strict=True))
        changed = sum(a != b for ours, one in pairs for a, b in zip(ours.tokens, one.tokens, strict=True))
        row = {
            "precision": precision,
            "requests": len(jobs),
            "same_tokens_and_steps": sum(o.tokens == a.tokens and o.steps == a.steps for o, a in pairs) / len(pairs),
            "same_steps": sum(ours.steps == one.steps for ours, one in pairs) / len(pairs),
            "masked_tokens_changed": changed / n_masked,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


class AsCaptured(PlainPasses):
    """Launches attention for the longest text the model takes, as a captured pass does. So the step to captured passes
    shows the cost of launches alone, without what shorter attention would save.
    """

    def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
        longest = min(bucket.n_rows, self._model.config.max_seq_len)
        super().__call__(buffers, replace(bucket, longest_live=longest))


class Engines:
    """A backend for each step, for all workloads of a model. The last is the one that is served."""

    def __init__(self, model: RDT, options: argparse.Namespace) -> None:
        bounds = (options.token_budget, options.max_live)
        self.captured = CapturedPasses(model) if can_capture(model) else None
        self.steps: dict[str, Backend] = {
            "refill": EagerBackend(model),
            "+ lookahead": LookaheadBackend(model, *bounds, AsCaptured(model)),
        }
        if self.captured is not None:
            self.steps["+ captured passes"] = LookaheadBackend(model, *bounds, self.captured)
        self.name, self.served = list(self.steps.items())[-1]


def ladder(model: RDT, engines: Engines, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Requests a second, medians of rounds in which all take their turns."""
    jobs = make_jobs(workload, options.requests, model.config.vocab_size)
    garbage.freeze()  # as the server does
    few = jobs[:LOOP_REQUESTS]
    as_many = sum(job.max_steps for job in few) / statistics.mean(job.max_steps for job in jobs)
    bounds = (options.token_budget, options.max_live)
    runs: dict[str, tuple[float, Callable[[], object]]] = {"loop": (as_many, partial(contenders.loop, model, few))}
    for size in options.sizes:
        contenders.static(model, jobs[:size], size)  # so that no size is chosen for what another loaded and allocated
        runs[f"static {size}"] = (len(jobs), partial(contenders.static, model, jobs, size))
        runs[f"sorted {size}"] = (len(jobs), partial(contenders.static, model, contenders.by_cost(jobs), size))
    queued: dict[str, list[int]] = {name: [] for name in engines.steps}
    for name, backend in engines.steps.items():
        runs[name] = (len(jobs), partial(contenders.serve, backend, jobs, *bounds, queued[name]))
    first = {name: [seconds(run, model.device)] for name, (_, run) in runs.items()}  # kernels, workspaces, captures
    runs = {name: run for name, run in runs.items() if name in finalists(first, n_sizes=1)}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (n, run) in runs.items():
            rates[name].append(n / seconds(run, model.device))
    rate = {name: statistics.median(found) for name, found in rates.items()}
    best = {kind: max((n for n in rate if n.startswith(kind)), key=rate.__getitem__) for kind in ("static", "sorted")}
    ours = engines.name
    useful = contenders.useful_flops(model, jobs)
    theory = contenders.static_flops(model, jobs, int(best["static"].split()[1])) / useful
    return {
        "workload": workload,
        "requests_per_second": {name: round(value, 1) for name, value in rate.items()},
        "tokens_per_second": round(rate[ours] * sum(len(job.tokens) for job in jobs) / len(jobs)),
        "over_loop": round(rate[ours] / rate["loop"], 2),
        "over_static": round(rate[ours] / rate[best["static"]], 2),
        "over_sorted": round(rate[ours] / rate[best["sorted"]], 2),
        "realised_over_theoretical": round(rate[ours] / rate[best["static"]] / theory, 3),
        "share_of_peak": round(useful / len(jobs) * rate[ours] / options.peak, 3),
        "graphs": len(engines.captured.graphs) if engines.captured is not None else None,
        "full_ticks": round(sum(n > 0 for n in queued[ours]) / len(queued[ours]), 3),
    }


def idle_share(model: RDT, backend: Backend, workload: str, options: argparse.Namespace) -> float:
    """Share of the time from the first kernel to the last in which none ran; NaN where profiling is not allowed.

    To be called after everything that is timed: a profiled process is slower from then on, and may crash.
    """
    jobs = make_jobs(workload, options.requests, model.config.vocab_size)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        contenders.serve(backend, jobs, options.token_budget, options.max_live)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == DeviceType.CUDA)
    if not spans:
        return math.nan
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - spans[0][0])


@names_files
def main() -> None:
    has_cuda = torch.cuda.is_available()
    parser = record.parser(__doc__)
    parser.add_argument("--device", choices=tuple(FORMATS), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--models", nargs="+", default=[str(BUNDLED), "base", "large"])
    parser.add_argument("--workloads", nargs="*", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--requests", type=count, default=4096 if has_cuda else 32)
    parser.add_argument("--agreement", type=natural, default=2000 if has_cuda else 32, help="requests; 0: none")
    parser.add_argument("--sizes", type=count, nargs="+", default=[64, 256, 512] if has_cuda else [4, 16])
    parser.add_argument("--token-budget", type=count, default=16_384 if has_cuda else 512)
    parser.add_argument("--max-live", type=count, default=512 if has_cuda else 64)
    parser.add_argument("--rounds", type=count, default=2 if has_cuda else 3)
    options = parser.parse_args()
    device = torch.device(options.device)
    models = {weights: load(weights) for weights in options.models}
    n = PEAK_SIZE if device.type == "cuda" else PEAK_SIZE // 8
    options.peak = matrix_peak(n, n, n, torch.bfloat16, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}: {options.peak / 1e12:.3g} TFLOP/s in bfloat16", flush=True)
    agreements: dict[str, Any] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    served: dict[str, tuple[RDT, Backend]] = {}
    for weights, model in models.items():
        model.to(device)
        if options.agreement:
            agreements[weights] = agreement(model, options)
        prepare(model, "bf16")
        results[weights], engines = [], Engines(model, options)
        for workload in options.workloads:
            results[weights].append(ladder(model, engines, workload, options))
            print(weights, results[weights][-1], flush=True)
        served[weights] = model, engines.served
    record.finish("gpu", options, accelerator=name, agreement=agreements, ladder=results)
    for weights, (model, backend) in served.items() if device.type == "cuda" and options.workloads else ():
        share = idle_share(model, backend, options.workloads[0], options)
        print(f"{weights}, {options.workloads[0]}: {share:.2%} of the time nothing ran on the card", flush=True)


if __name__ == "__main__":
    main()
