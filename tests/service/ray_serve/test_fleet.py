"""What makes many replicas one service, without a cluster: their metrics, their number, their settings."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import warnings
from collections.abc import Mapping
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.fleet import Replica as SimulatedReplica
from benchmarks.fleet import saturate
from benchmarks.tick_cost import TickCost
from benchmarks.traffic import draw, steady
from service.engine.scheduler import SchedulerLimits
from service.engine.types import Outcome, Plan
from service.errors import RETRY_SECONDS, FailedPrecondition, ServiceError, Unavailable
from service.settings import SettingsError
from tests.fakes import FakeClock

pytest.importorskip("ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, about pydantic
    from ray.exceptions import ActorDiedError

    from service import ray_serve
    from service.ray_serve import metering
    from service.ray_serve.application import application, max_ongoing
    from service.ray_serve.metering import Board, Load, RayBoard, ReplicaMetrics, merge
    from service.ray_serve.options import n_batches, read_arguments
    from service.ray_serve.replica import EngineFailed, Replica
    from service.ray_serve.scaling import WaitingPolicy, wanted


class FakeBoard:
    def __init__(self, reports: dict[str, str] | None = None, error: Exception | None = None) -> None:
        self._reports, self._error = reports or {}, error

    async def put(self, replica: str, report: str) -> None:
        self._reports[replica] = report

    async def drop(self, replica: str) -> None:
        self._reports.pop(replica)

    async def reports(self) -> dict[str, str]:
        if self._error is not None:
            raise self._error
        return self._reports


def test_every_sample_names_its_replica_and_every_family_comes_once() -> None:
    report = '# HELP n A number.\n# TYPE n counter\nn{a="} 1",b="x y"} 1.0\nn 2.0\n# HELP m Other.\n# TYPE m gauge\n'
    assert merge({"b": report + "m 3.0\n", "a": report}) == (
        "# HELP n A number.\n# TYPE n counter\n"
        'n{replica="a",a="} 1",b="x y"} 1.0\nn{replica="a"} 2.0\n'
        'n{replica="b",a="} 1",b="x y"} 1.0\nn{replica="b"} 2.0\n'
        '# HELP m Other.\n# TYPE m gauge\nm{replica="b"} 3.0\n'
    )


async def test_a_replica_shows_the_others_as_reported_and_itself_as_it_is() -> None:
    clock = FakeClock()
    board = FakeBoard()
    one, two = (ReplicaMetrics(clock, name, board) for name in ("one", "two"))
    reporting = asyncio.create_task(two.report_forever())
    one.passes.inc(1)
    two.passes.inc(2)
    while not await board.reports():
        await asyncio.sleep(0)
    shown = (await one.scrape()).decode()
    assert 'rdt_passes_total{replica="one"} 1.0' in shown
    assert 'rdt_passes_total{replica="two"} 2.0' in shown
    assert shown.count("# TYPE rdt_passes_total counter") == 1
    reporting.cancel()
    await two.leave()
    assert 'replica="two"' not in (await one.scrape()).decode()


async def test_without_the_board_a_replica_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ReplicaMetrics(FakeClock(), "one", FakeBoard({"two": "# HELP n \n# TYPE n gauge\nn 1\n"}))
    assert 'n{replica="two"} 1' in (await metrics.scrape()).decode()
    monkeypatch.setattr(metrics, "_board", FakeBoard(error=ActorDiedError()))
    shown = (await metrics.scrape()).decode()
    assert 'replica="two"' not in shown
    assert 'rdt_passes_total{replica="one"} 0.0' in shown


def test_the_board_forgets_who_no_longer_reports() -> None:
    clock = FakeClock()
    board = Board(clock)
    board.put("old", "1")
    clock.now += metering.STALE_SECONDS
    board.put("new", "2")
    assert set(board.reports()) == {"old", "new"}
    clock.now += 0.1
    assert set(board.reports()) == {"new"}
    board.drop("new")
    board.drop("new")
    assert board.reports() == {}


async def test_a_board_that_died_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(_replica: str, _report: str) -> None:
        raise ActorDiedError

    async def live(_replica: str, _report: str) -> None:
        return None

    actors = [SimpleNamespace(put=SimpleNamespace(remote=put)) for put in (die, live)]
    board = RayBoard("name")
    monkeypatch.setattr(board, "_find", lambda: actors.pop(0))
    with pytest.raises(ActorDiedError):
        await board.put("one", "")
    await board.put("one", "")
    assert actors == []


def test_load_is_the_time_that_full_ticks_would_take() -> None:
    clock = FakeClock()
    metrics = ReplicaMetrics(clock, "one", FakeBoard())
    metrics.describe_bounds(SchedulerLimits(100, max_live=4, max_waiting=1, max_waiting_tokens=1), replicas=1)

    def ticked(seconds: float, n_tokens: int, n_live: int = 1) -> None:
        plan = Plan((), (), frozenset(), (), live=tuple(range(n_live)), n_tokens=n_tokens)
        metrics.ticked(seconds, plan, Outcome({}, n_decoded=0))

    clock.now += 10
    for _ in range(4):
        ticked(1.0, n_tokens=50)
    assert metrics.load(1) == pytest.approx(0.4), "nothing is known of full ones: as long as these took"
    ticked(1.2, n_tokens=100)
    clock.now += 10
    assert metrics.load(1) == pytest.approx(0.12)
    for _ in range(4):
        ticked(1.0, n_tokens=50)
    clock.now += 10
    assert metrics.load(1) == pytest.approx(4 * 0.6 / 10), "two of them are the work of one that is full"
    ticked(1.2, n_tokens=10, n_live=4)
    clock.now += 10
    assert metrics.load(1) == pytest.approx(0.12), "as many texts as may be are a full one, too"
    clock.now += 10
    assert metrics.load(1) == 0, "since it was asked last"
    ticked(8.0, n_tokens=100)
    clock.now += 1
    assert metrics.load(2) == 1, "two batches at once, over the time that is counted"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_fewer_replicas_are_wanted_only_where_they_can_do_the_work(share: float) -> None:
    """Of four, by simulation. At 80 % of what they can do, their ticks have a third of the tokens that they could."""
    cost = TickCost.read("benchmarks/results/simulate-choose-avx512.json")
    limits = SchedulerLimits(token_budget=512, max_live=64, max_waiting=256, max_waiting_tokens=16_384)
    largest = saturate(draw("mixed", repeat(0.0, 300)), 64, cost, limits).throughput
    load = Load()
    load.describe_bounds(limits)

    class Measured(SimulatedReplica):
        def _begin_tick(self, now: float) -> None:
            before = self.books.busy_seconds
            super()._begin_tick(now)
            if self._plan is not None:
                load.ticked(self.books.busy_seconds - before, self._plan)

    replica = Measured(limits, cost)
    for arrival in draw("mixed", steady(share * largest, 60.0)):
        replica.offer(arrival)
    load.take()  # what full ticks take is known by now
    before = replica.books.seconds
    for arrival in draw("mixed", steady(share * largest, 60.0), seed=1):
        replica.offer(arrival._replace(time=before + arrival.time))
    found = load.take() / (replica.books.seconds - before)
    assert share - 0.1 < found < share + 0.2
    left = math.ceil(wanted(4, 0, 4 * found, target_waiting=8, target_load=0.7))
    assert 4 * share / left < 0.95


@pytest.mark.parametrize(
    ("n_replicas", "waiting", "load", "expected"),
    [
        (2, 0, 0.0, 0),  # idle: Serve's bounds keep the least
        (2, 16, 2.0, 2),  # as many waiting as is meant
        (2, 32, 2.0, 4),
        (4, 0, 1.4, 2),  # the work of two
        (4, 3, 3.9, 4),  # full, and nobody waits: stay
        (1, 0, 1.0, 1),  # the load alone asks for no more
    ],
)
def test_how_many_are_wanted(n_replicas: int, waiting: float, load: float, expected: float) -> None:
    assert wanted(n_replicas, waiting, load, target_waiting=8, target_load=0.7) == pytest.approx(expected)


def context(n_replicas: int, metrics: Mapping[str, Mapping[str, float]], queued: float = 0) -> Any:
    return SimpleNamespace(
        current_num_replicas=n_replicas, target_num_replicas=3, running_replicas=["a", "b"][:n_replicas],
        total_queued_requests=queued, aggregated_metrics=metrics,
    )  # fmt: skip


def test_the_policy_adds_up_what_replicas_and_proxies_say() -> None:
    policy = WaitingPolicy(target_waiting=8, target_load=0.5)
    both = {"waiting": {"a": 10.0, "b": 20.0}, "load": {"a": 1.0, "b": 1.0}}
    assert policy(context(2, both, queued=10)) == (5, {})
    assert policy(context(2, {"waiting": {"a": 0.0}, "load": {"a": 0.0}})) == (2, {}), "one is silent: no fewer"
    relaxed = WaitingPolicy(target_waiting=8, target_load=1.0)
    assert relaxed(context(2, {"load": {"a": 0.25}})) == (1.25, {}), "and no more than all"
    assert policy(context(2, {})) == (3, {}), "nobody has reported yet: as decided before"
    assert policy(context(0, {})) == (3, {})


def test_the_bounds_agree_with_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDT_GRACE_SECONDS", "7")
    settings, fleet = read_arguments({"max_waiting": "10", "max_live": 1, "num_cpus": 4})
    config = application(settings, fleet)._bound_deployment._deployment_config
    assert settings.replicas == 4
    assert config.max_ongoing_requests == max_ongoing(settings, fleet) > 10 + 4
    assert config.max_queued_requests == 4 * max_ongoing(settings, fleet), "a burst that all can hold is not refused"
    assert config.graceful_shutdown_timeout_s > 7
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 4)
    refusal = config.backpressure_config
    assert (refusal.status_code, refusal.retry_after_s) == (429, RETRY_SECONDS), "as the engine refuses"


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDT_MAX_WAITING", "3")
    monkeypatch.setenv("RDT_TOKEN_BUDGET", "77")
    settings, fleet = read_arguments({"max_waiting": "5", "checkpoint": "a.pt", "max_replicas": "9"})
    assert (settings.max_waiting, settings.token_budget, fleet.max_replicas) == (5, 77, 9)
    assert settings.checkpoint.is_absolute(), "a replica's folder is another"


def test_every_device_of_a_replica_computes_batches_of_its_own() -> None:
    settings, fleet = read_arguments({"num_gpus": 2, "devices": "0,1", "max_waiting": 100, "max_live": 50})
    assert n_batches(settings) == 2
    assert max_ongoing(settings, fleet) > 100 + 2 * 50


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(SettingsError, match="num_cpus is Infinity: want a finite number >= 0"):
        read_arguments({"num_cpus": float("inf")})


@pytest.mark.parametrize(
    ("arguments", "replicas"),
    [
        ({}, 1), ({"num_cpus": 0}, 1), ({"num_cpus": 4}, 4), ({"num_cpus": 5, "threads": 2}, 2),
        ({"num_cpus": 4, "replicas": 3}, 3), ({"num_cpus": 4, "num_gpus": 1}, 0),
    ],
)  # fmt: skip
def test_a_replica_computes_as_many_batches_as_it_has_cores(arguments: dict[str, object], replicas: int) -> None:
    assert read_arguments(arguments)[0].replicas == replicas


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"max_wating": 1}, "max_wating is not an argument: want one of api_key, checkpoint,"),
        ({"max_waiting": 0}, r"max_waiting \(RDT_MAX_WAITING\) is \"0\": want a whole number from 1 to"),
        ({"http_port": 1}, "http_port is not an argument here: see http_options"),
        ({"admin_key": "k"}, "admin_key is not an argument here: see user_config"),
        ({"min_replicas": 0}, "min_replicas is 0: want a whole number >= 1"),
        ({"target_load": "x"}, 'target_load is "x": want a finite number > 0 and <= 1'),
        ({"min_replicas": 5}, "max_replicas is 4: want at least min_replicas = 5"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        ray_serve.build(arguments)


async def test_a_replica_whose_engine_gave_up_is_not_healthy() -> None:
    replica: Any = SimpleNamespace(_host=SimpleNamespace(failed=asyncio.Event()))
    await Replica.check_health(replica)
    replica._host.failed.set()
    with pytest.raises(EngineFailed):
        await Replica.check_health(replica)


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (None, ["reload: swapped"]),
        (FailedPrecondition("the checkpoint cannot be served"), []),  # the host itself has logged more of it
        (Unavailable("the engine has failed", "failed"), ["no reload: the engine has failed"]),
    ],
)
async def test_a_reload_that_fails_does_not_cost_the_replica(
    error: ServiceError | None, logged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service")
    asked = 0

    async def reload() -> Any:
        nonlocal asked
        asked += 1
        if error is not None:
            raise error
        return SimpleNamespace(outcome="swapped")

    async def at_rest() -> None: ...

    replica: Any = SimpleNamespace(_host=SimpleNamespace(reload=reload, at_rest=at_rest))
    await Replica.reconfigure(replica, {"weights": 2})
    assert asked == 1
    assert [record.message for record in caplog.records if record.name.startswith("service")] == logged


def test_without_the_extra_there_is_a_hint() -> None:
    script = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ray' else find(name, *a)\n"
        "import service.ray_serve"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    hint = "pip install '.[ray]' in the project's folder"
    assert run.stderr.splitlines()[-1] == f"ImportError: Ray is not installed: {hint}"


def test_settings_from_the_environment_alone_will_do() -> None:
    """`serve run service.ray_serve:app`."""
    assert ray_serve.app._bound_deployment.name == "Denoiser"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ray_serve.nothing
