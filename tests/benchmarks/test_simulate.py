from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from array import array
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import pytest

from benchmarks import simulate as command
from benchmarks import sizing
from benchmarks.fleet import ROUTINGS, Routing, saturate, simulate
from benchmarks.fleet_report import Books, Report, report
from benchmarks.replay import Comparison, Replay
from benchmarks.sizing import choose_bounds, choose_budget, fewest, try_budgets
from benchmarks.tick_cost import Tick, TickCost, fit
from benchmarks.traffic import DAY_SECONDS, Arrival, daily, draw, steady
from benchmarks.workloads import make_jobs
from service.engine.scheduler import SchedulerLimits

ROOT = Path(__file__).parents[2]
COST = TickCost(tick=0.01, token=0.001, row=0.002, coda=0.1)
LIMITS = SchedulerLimits(token_budget=256, max_live=32, max_waiting=64, max_waiting_tokens=10**6)
SECONDS = 60.0


def run(
    rate: float, cost: TickCost = COST, limits: SchedulerLimits = LIMITS, replicas: int = 1, seed: int = 0
) -> Report:
    return simulate(draw("mixed", steady(rate, SECONDS, seed), seed), cost, limits, replicas)


def test_one_request_alone_takes_its_passes_and_one_coda() -> None:
    report = simulate([Arrival.of(5.0, n_tokens=20, n_masked=3, depth=4)], COST, LIMITS)
    assert report.latencies.tolist() == [pytest.approx(4 * (0.01 + 20 * 0.001) + 0.1 + 3 * 0.002)]
    assert report.queue_ms["max"] == 0


def test_two_requests_share_their_ticks() -> None:
    pair = [Arrival.of(0.0, 20, 3, 4), Arrival.of(0.0, 10, 1, 4)]
    report = simulate(pair, COST, LIMITS)
    alone, together = 0.01 + 20 * 0.001, 0.01 + 30 * 0.001
    assert report.seconds == pytest.approx(alone + 3 * together + 0.106 + alone - 10 * 0.001 + 0.102)
    assert report.mean_tick_tokens == pytest.approx((20 + 3 * 30 + 10) / 5)


def test_the_front_end_costs_the_engine_only_on_a_shared_core() -> None:
    pair = [Arrival.of(0.0, 20, 3, 1), Arrival.of(0.0, 20, 3, 1)]
    plain, shared, beside = (
        simulate(pair, cost, LIMITS) for cost in (COST, replace(COST, request=0.5), replace(COST, outside=0.5))
    )
    assert shared.seconds == pytest.approx(plain.seconds + 2 * 0.5)
    assert beside.seconds == pytest.approx(plain.seconds)
    assert beside.latencies == pytest.approx(plain.latencies + 0.5)


def test_the_figures_of_a_fleet_are_those_of_its_replicas() -> None:
    busy = Books(8.0, n_refused=2, n_ticks=2, n_tokens=30, steps_shed=3, busy_seconds=6.0,
                 latencies=array("d", [4.0, 1.0, 3.0, 2.0]), queueing=array("d", [0.5, 0.0, 0.0, 1.0]))  # fmt: skip
    idle = Books(10.0, 0, 3, 20, 1, 2.0, array("d", [0.5]), array("d", [0.0]))
    found = report([busy, idle])
    assert (found.seconds, found.arrived, found.answered, found.refused) == (10.0, 7, 5, 2)
    assert (found.throughput, found.utilisation) == (0.5, pytest.approx(8 / 20))
    assert (found.mean_tick_tokens, found.mean_tick_ms, found.steps_shed) == (10.0, 1600.0, 4)
    assert found.latency_ms == {"p50": 2000.0, "p90": 4000.0, "p99": 4000.0, "max": 4000.0}
    assert found.queue_ms["p50"] == 0.0
    assert (found.utilisation_spread, found.p99_ms_spread) == ((0.2, 0.6), (500.0, 4000.0))
    assert (found.share_within(2.0), found.refused_share) == (3 / 7, 2 / 7), "a refused one is not answered"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_everything_that_arrives_is_answered_or_refused(routing: Routing) -> None:
    n = len(list(steady(200.0, SECONDS)))
    report = simulate(draw("mixed", steady(200.0, SECONDS)), COST, LIMITS, replicas=3, routing=routing)
    assert report.arrived == n == report.answered + report.refused
    assert 0 < report.refused_share < 1
    assert 0.9 < report.utilisation <= 1


def test_utilisation_is_the_time_ticks_take() -> None:
    report = simulate([Arrival.of(7.0, 10, 1, 10)], TickCost(0.1, 0.0, 0.0), LIMITS)
    assert report.seconds == pytest.approx(8.0)
    assert report.utilisation == pytest.approx(1 / 8)


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    assert run(5.0).figures() == run(5.0).figures() != run(5.0, seed=1).figures()


def test_latency_rises_with_load() -> None:
    means = [float(run(rate).latencies.mean()) for rate in (0.5, 2.0, 4.0, 8.0)]
    assert means == sorted(means)
    assert means[-1] > 2 * means[0]


def test_a_lone_server_of_equal_requests_queues_as_theory_says() -> None:
    """M/D/1: one live at a time, a second each; at a load of 1/2 the mean wait is half a second."""
    limits = replace(LIMITS, max_live=1, max_waiting=10**6)
    arrivals = (Arrival.of(time, 8, 1, 1) for time in steady(0.5, 40_000.0))
    report = simulate(arrivals, TickCost(1.0, 0.0, 0.0), limits)
    assert report.latencies.mean() - 1 == pytest.approx(0.5, rel=0.05)


def test_a_bounded_queue_refuses() -> None:
    crowd = [Arrival.of(0.0, 256, 1, 2)] * 10
    assert simulate(crowd, COST, replace(LIMITS, max_waiting=4)).refused == 5
    assert simulate(crowd, COST, replace(LIMITS, max_waiting_tokens=512)).refused == 7


def test_shedding_trades_passes_for_refusals() -> None:
    full, shed = run(100.0), run(100.0, limits=replace(LIMITS, shed_min_steps=1))
    assert full.steps_shed == 0 < shed.steps_shed
    assert shed.refused < full.refused


def test_ten_replicas_serve_ten_times_as_much() -> None:
    one, ten = run(40.0), run(400.0, replicas=10)
    assert ten.throughput == pytest.approx(10 * one.throughput, rel=0.1)


def test_a_better_router_evens_out() -> None:
    arrivals = list(draw("mixed", steady(12.0, SECONDS)))
    tails = {r: simulate(arrivals, COST, LIMITS, replicas=8, routing=r).latency_ms["p99"] for r in ROUTINGS}
    assert tails["least"] < tails["two"] < tails["turns"]


def test_a_closed_loop_keeps_its_number_inside() -> None:
    report = saturate((Arrival.of(0.0, 8, 1, 1) for _ in range(12)), 4, TickCost(1.0, 0.0, 0.0), LIMITS)
    assert report.answered == 12
    assert (
        report.seconds == 6
    )  # ticks of one and of three, in turns: an answered caller comes back during the next tick
    assert saturate(draw("mixed", repeat(0.0, 50)), 1, COST, LIMITS).queue_ms["max"] == 0


def test_a_day_has_a_trough_and_a_peak() -> None:
    times = list(daily(trough=0.1, peak=0.5, seconds=DAY_SECONDS))
    assert len(times) == pytest.approx(0.3 * DAY_SECONDS, rel=0.03)
    noon = [time for time in times if abs(time - DAY_SECONDS / 2) < 3600]
    assert len(noon) == pytest.approx(0.5 * 7200, rel=0.1)


def test_a_fit_finds_the_cost_behind_noisy_ticks() -> None:
    rng = random.Random(0)
    truth = TickCost(tick=0.005, token=1e-4, row=2e-4, coda=0.009)
    sizes = [(rng.randrange(8, 1024), rng.choice((0, 0, rng.randrange(1, 100)))) for _ in range(500)]
    ticks = [Tick(n, rows, truth.seconds(n, rows, 0) * rng.uniform(0.98, 1.02)) for n, rows in sizes]
    fitted = fit(ticks)
    for name in ("tick", "token", "row", "coda"):
        assert getattr(fitted.cost, name) == pytest.approx(getattr(truth, name), rel=0.05)
    assert fitted.r2 > 0.99
    assert fitted.mean_relative_error == pytest.approx(0.01, rel=0.25), "half of the largest"
    mean_ms = 1e3 * sum(tick.seconds for tick in ticks) / len(ticks)
    assert fitted.mean_absolute_error_ms == pytest.approx(0.01 * mean_ms, rel=0.25)
    assert (fitted.n_fitted, fitted.n_held_out) == (400, 100)


def test_a_fit_has_no_negative_cost() -> None:
    ticks = [Tick(n, rows, 0.001 * n - 0.002) for n in range(10, 60) for rows in (0, 1)]
    assert fit(ticks).cost.tick == 0


def test_costs_are_read_from_numbers_and_from_files(tmp_path: Path) -> None:
    assert TickCost.read("0.01,0.001,0.002,0.1") == COST
    path = tmp_path / "cost.json"
    for content in (
        {"tick": 1, "token": 2, "row": 3},
        {"benchmark": "simulate", "cost": {"tick": 1, "token": 2, "row": 3}},
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert TickCost.read(str(path)) == TickCost(1, 2, 3)


def test_a_cost_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text('{"tick": 1, "tokens": 2}', encoding="utf-8")
    for text in ("0.01", "a,b,c", str(tmp_path / "cost.json")):
        with pytest.raises(ValueError, match=r"cost is|could not convert"):
            TickCost.read(text)


def test_the_budget_chosen_is_the_smallest_that_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "REQUESTS", 300)
    monkeypatch.setattr(sizing, "TOKEN_BUDGETS", (64, 128, 512))
    no_overhead, all_overhead = TickCost(1e-6, 1e-4, 0.0), TickCost(0.1, 1e-9, 0.0)
    for cost, budget in ((no_overhead, 128), (all_overhead, 512)):
        assert choose_budget(try_budgets(cost, "mixed")).token_budget == budget


def test_the_bounds_chosen_keep_the_wait_near_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "REQUESTS", 300)
    bounds = choose_bounds(COST, "easy", choose_budget(try_budgets(COST, "easy")), patience=5.0)
    assert 3.0 < bounds.queue_p50_seconds < bounds.queue_max_seconds < 7.5


def test_the_fewest_replicas_are_found() -> None:
    for wanted in (1, 2, 3, 37, 64):
        assert fewest(wanted.__le__) == wanted
    with pytest.raises(ValueError, match="not enough"):
        fewest(lambda _: False)


def test_a_plan_says_how_large_a_server_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan", "4", "--p99", "20", "--seconds", "20", "--cost", "0.01,0.001,0.002,0.1"]
    monkeypatch.setattr(sys, "argv", ["simulate", *flags, "--replicas=1"])
    command.main()
    assert "servers of one replica (one core) answer 4 requests/s, 99 of 100 within 20 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"), [("--replicas=2", "servers of one replica are"), ("--threads=2", "want no --threads")]
)
@pytest.mark.parametrize("mode", [["--plan=4"], ["--choose"], ["--rate=4"]])
def test_a_flag_that_would_change_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, mode: list[str], flag: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", *mode, "--cost", "0.01,0.001,0.002,0.1", flag])
    with pytest.raises(SystemExit, match=message):
        command.main()


def test_a_result_that_was_simulated_is_met_again() -> None:
    """What the simulator itself measured, on a machine half as fast, comes out as it went in."""
    jobs = make_jobs("easy", 40, vocab_size=2000)
    requests, slow = [Arrival(0.0, job, sum(job.masked)) for job in jobs], replace(COST.times(2.0), outside=0.25)
    full = saturate(requests, 8, slow, LIMITS)
    times = islice(steady(0.5 * full.throughput, math.inf), 40)
    half = simulate([a._replace(time=t) for a, t in zip(requests, times, strict=True)], slow, LIMITS)
    level = {"share": 0.5, "requests": 40, "answered_per_second": half.throughput, "mean_tick_ms": half.mean_tick_ms,
             "p50_ms": half.latency_ms["p50"], "p99_ms": half.latency_ms["p99"],
             "mean_tick_tokens": half.mean_tick_tokens}  # fmt: skip
    result = {
        "options": {"workload": "easy", "requests": 40, "server_flags": ["--replicas=1"]},
        "front_end": {"rest": {"added_ms": 250.0}},
        "transports": {"rest": {"capacity_per_second": full.throughput, "concurrency": 8, "levels": [level]}},
    }
    pace, *others = Replay.of(result, LIMITS, vocab_size=2000).compare(COST)
    assert pace.figure == "pace"
    assert pace.measured == pytest.approx(2.0, rel=0.001)
    assert not pace.good
    assert len(others) == 5
    assert all(each.error == pytest.approx(0.0, abs=0.002) for each in others)


@pytest.mark.parametrize(
    ("flags", "levels"), [([], [{"share": 0.5}]), (["--replicas=16"], [{"share": 0.5}]), (["--replicas=1"], [])]
)
def test_a_result_of_something_else_is_refused(flags: list[str], levels: list[dict[str, float]]) -> None:
    options = {"workload": "easy", "requests": 4, "server_flags": flags}
    with pytest.raises(ValueError, match=r"want a result of benchmarks\.serve with --replicas=1 and with levels"):
        Replay.of({"options": options, "transports": {"rest": {"levels": levels}}}, LIMITS, vocab_size=2000)


def test_only_what_is_promised_is_judged() -> None:
    assert not Comparison("rest 80%", "p99_ms", 100.0, 120.0).good
    assert Comparison("rest 80%", "p99_ms", 100.0, 110.0).good
    assert Comparison("rest 80%", "mean_tick_tokens", 100.0, 120.0).good


def test_a_simulation_needs_no_torch() -> None:
    script = "import sys, benchmarks.simulate; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
