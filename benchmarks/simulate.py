"""`python -m benchmarks.simulate`: the server's own scheduler under a simulated clock.

A second is enough for thousands of requests: time jumps from tick to tick, and what a tick costs is a formula,
fitted to ticks of the real engine on this machine (`--model`) or given (`--cost`, which needs no torch).

(no mode)             traffic at a rate, or over a day, on any number of servers (of one replica each)
--choose              the token budget and the queue's bounds that suit a machine
--plan R --p99 S      how many servers of one replica (one core) answer R requests a second, 99 of 100 within S seconds
--check RESULT        a saved result of benchmarks.serve, measured beside simulated; ends with 1 if the pace, the
                      rate or a p99 is more than 15 % off

Flags that are not listed here are the server's (`--token-budget 1024`, `--max-waiting 256`, `--shed depth`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks import BUNDLED, record, sizing
from benchmarks.fleet import ROUTINGS, simulate
from benchmarks.options import amount, count, natural, positive
from benchmarks.replay import TOLERANCE, Replay
from benchmarks.tick_cost import TickCost, fit, measure
from benchmarks.traffic import DAY_SECONDS, Arrival, daily, draw, steady
from benchmarks.workloads import WORKLOADS
from service.settings import Settings, read_settings

if TYPE_CHECKING:
    from rdt_core import LoadedModel

HOUR_SECONDS = 3600.0
PLAN_SECONDS = 300.0

Figures = dict[str, Any]
Mode = Callable[[TickCost, Settings, argparse.Namespace], Figures]


def cost_of(options: argparse.Namespace, settings: Settings) -> tuple[TickCost, Figures]:
    """The cost of a tick, given or fitted, and how well it fits."""
    cost, quality = (TickCost.read(options.cost), {}) if options.cost else fit_here(options, settings)
    if options.front_end_ms is not None:
        where = "request" if options.shared_core else "outside"
        cost = replace(cost, **{where: options.front_end_ms / 1e3})
    print("cost in ms:", *(f"{name} {1e3 * value:.4g}" for name, value in asdict(cost).items()), sep="  ")
    return cost, quality


def fit_here(options: argparse.Namespace, settings: Settings) -> tuple[TickCost, Figures]:
    """Fitted to ticks of the real engine on this machine."""
    model = load(options.model, settings).model
    fitted = fit(measure(model, options.workload, options.fit_requests, options.fit_rounds))
    print("fit:", *(f"{name} {value}" for name, value in fitted.figures().items()), sep="  ")
    return fitted.cost, fitted.figures()


def load(name: str, settings: Settings) -> LoadedModel:
    """As the server loads it: a checkpoint, or random weights of a preset."""
    import torch  # noqa: PLC0415 - a simulation with a given cost does without

    from benchmarks.server import weights_of  # noqa: PLC0415
    from service.loading import load_model  # noqa: PLC0415

    torch.set_num_threads(settings.threads)
    with TemporaryDirectory() as folder:
        return load_model(weights_of(name, folder), settings.device, settings.precision)


def traffic(cost: TickCost, settings: Settings, options: argparse.Namespace) -> Figures:
    """A rate or a day on a fleet."""
    if options.day:
        trough, peak = options.day
        times = daily(trough, peak, options.seconds or DAY_SECONDS, options.seed)
    else:
        times = steady(options.rate, options.seconds or HOUR_SECONDS, options.seed)
    arrivals = draw(options.workload, times, options.seed)
    report = simulate(arrivals, cost, settings.limits_on("cpu"), options.servers, options.routing)
    show(report.figures())
    return {"report": report.figures()}


def choose(cost: TickCost, _settings: Settings, options: argparse.Namespace) -> Figures:
    """Defaults for this cost and this workload, and why."""
    trials = sizing.try_budgets(cost, options.workload)
    best = sizing.choose_budget(trials)
    alike = f"p99 ms at {sizing.NEAR_LOAD * trials[0].throughput:.1f}/s"
    print(f"{'budget':>7} {'max live':>9} {'answers/s':>10} {'full tick ms':>13} {'p99 ms at 80 %':>15} {alike:>17}")
    for trial in trials:
        mark = "  <- the smallest within 3 % of the best" if trial is best else ""
        times = f"{trial.tick_ms:13.1f} {trial.p99_ms:15.0f} {trial.p99_alike_ms:17.0f}"
        print(f"{trial.token_budget:7} {trial.max_live:9} {trial.throughput:10.2f} {times}{mark}")
    bounds = sizing.choose_bounds(cost, options.workload, best, options.patience)
    print(f"a cancellation or a deadline waits for one tick: {best.tick_ms:.0f} ms when it is full;")
    print("no budget may be under the model's max_seq_len")
    print(
        f"max_waiting {bounds.max_waiting}, max_waiting_tokens {bounds.max_waiting_tokens}: what is served in"
        f" {options.patience:g} s; at twice the capacity the accepted wait {bounds.queue_p50_seconds:.1f} s (median),"
        f" {bounds.queue_max_seconds:.1f} s (longest)"
    )
    return {"budgets": [asdict(trial) for trial in trials], "token_budget": best.token_budget, "bounds": asdict(bounds)}


def plan(cost: TickCost, settings: Settings, options: argparse.Namespace) -> Figures:
    """The size of a fleet."""

    def arrivals() -> Iterator[Arrival]:
        times = steady(options.plan, options.seconds or PLAN_SECONDS, options.seed)
        return draw(options.workload, times, options.seed)

    replicas, report = sizing.plan_fleet(arrivals, options.p99, cost, settings.limits_on("cpu"), options.routing)
    cores = "one core" if settings.threads == 1 else f"{settings.threads} cores"
    print(
        f"{replicas} servers of one replica ({cores}) answer {options.plan:g} requests/s,"
        f" 99 of 100 within {options.p99:g} s"
    )
    show(report.figures())
    return {"servers": replicas, "report": report.figures()}


def check(cost: TickCost, settings: Settings, options: argparse.Namespace) -> Figures:
    """Measured beside simulated."""
    result = json.loads(options.check.read_text(encoding="utf-8"))
    again = Replay.of(result, settings.limits_on("cpu"), load(options.model, settings).tokenizer.vocab_size)
    comparisons = list(again.compare(cost))
    for each in comparisons:
        mark = "" if each.good else f"  more than {TOLERANCE:.0%} off"
        figures = f"measured {each.measured:9.2f}  simulated {each.simulated:9.2f}  {each.error:+7.1%}"
        print(f"{each.where:10} {each.figure:20} {figures}{mark}")
    good = all(each.good for each in comparisons)
    return {"comparisons": [asdict(each) for each in comparisons], "good": good}


def show(figures: Figures) -> None:
    for name, value in figures.items():
        print(f"  {name:20} {value}")


def refuse_what_changes_nothing(settings: Settings, options: argparse.Namespace) -> None:
    """Raises `ValueError` for settings that a simulation would take and not follow."""
    if options.check:  # of what was served
        return
    if settings.replicas > 1:
        raise ValueError("servers of one replica are simulated: want no --replicas (RDT_REPLICAS)")
    if options.cost and settings.threads > 1:
        raise ValueError("--cost already says how fast a tick is: want no --threads (RDT_THREADS) with it")


def mode_of(options: argparse.Namespace) -> Mode:
    if options.check:
        return check
    if options.plan:
        return plan
    return choose if options.choose else traffic


def parse() -> argparse.Namespace:
    parser = record.parser(__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--choose", action="store_true")
    modes.add_argument("--plan", type=positive, metavar="RATE")
    modes.add_argument("--check", type=Path, metavar="RESULT")
    cost = parser.add_argument_group("what a tick costs")
    cost.add_argument("--cost", help="seconds: tick,token,row[,coda]; or a JSON file, such as a saved result")
    cost.add_argument("--model", default=str(BUNDLED), help="otherwise fitted here, to this checkpoint or preset")
    cost.add_argument("--front-end-ms", type=amount, help="one request's reading, tokenising and answering")
    cost.add_argument("--shared-core", action="store_true", help="the front end works on the engine's core")
    cost.add_argument("--fit-requests", type=count, default=48)
    cost.add_argument("--fit-rounds", type=count, default=3)
    load = parser.add_argument_group("traffic and fleet")
    load.add_argument("--workload", choices=WORKLOADS, default="mixed")
    load.add_argument("--rate", type=positive, default=10.0, help="requests a second")
    load.add_argument("--day", type=positive, nargs=2, metavar=("TROUGH", "PEAK"), help="rates at midnight and at noon")
    load.add_argument("--seconds", type=positive, help="default: an hour, a day with --day, five minutes with --plan")
    load.add_argument("--servers", type=count, default=1, help="of one replica each, every one with its own queue")
    load.add_argument(
        "--routing", choices=ROUTINGS, default="turns", help="in turns, or to the least loaded of two or all"
    )
    load.add_argument("--seed", type=natural, default=0)
    load.add_argument("--p99", type=positive, default=1.0, help="seconds, for --plan")
    load.add_argument("--patience", type=positive, default=10.0, help="longest queueing in seconds, for --choose")
    options, server_flags = parser.parse_known_args()
    options.server_flags = server_flags
    return options


def adopt(options: argparse.Namespace) -> None:
    """Simulate what was served. Raises `ValueError` for a file that tells of something else."""
    result = json.loads(options.check.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or result.get("benchmark") != "serve":
        raise ValueError("--check: want a saved result of benchmarks.serve")
    served = result["options"]
    options.model, options.workload, options.server_flags = (served[n] for n in ("model", "workload", "server_flags"))


def main() -> None:
    options = parse()
    try:
        if options.check:
            adopt(options)
        settings = read_settings(options.server_flags)
        refuse_what_changes_nothing(settings, options)
        cost, quality = cost_of(options, settings)
        figures = mode_of(options)(cost, settings, options)
    except (ValueError, OSError) as error:
        sys.exit(f"simulate: {error}")
    record.finish("simulate", options, cost=asdict(cost), fit=quality, **figures)
    if not figures.get("good", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
