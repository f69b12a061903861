"""Any worker that is scraped shows the whole server, and nothing that was shown is taken back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rdt_core import ModelConfig, Tokenizer
from service.engine.scheduler import SchedulerLimits
from service.errors import InvalidArgument, Unavailable
from service.metrics import Metrics
from service.settings import Settings
from service.workers import metering
from service.workers.messages import Hello, Report
from service.workers.metering import Ledger
from service.workers.wire import Wire
from service.workers.worker import Worker
from tests.fakes import FakeClock
from tests.service.engine.scripted import ScriptedBackend
from tests.service.workers.fleet import Fleet, OneEngine, ask, brief, denoiser_of, running, until

LIMITS = SchedulerLimits(token_budget=32, max_live=4, max_waiting=30, max_waiting_tokens=1000)
OK = 'rdt_requests_total{outcome="ok",transport="rest"}'
BAD = 'rdt_requests_total{outcome="invalid_argument",transport="rest"}'
PASSES, TICKS = "rdt_passes_total", "rdt_tick_tokens_count"


@pytest.fixture
async def fleet(tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> AsyncIterator[Fleet]:
    host = OneEngine([ScriptedBackend()], LIMITS)
    async with running(
        Fleet(tmp_path / "engine", host, Settings()), denoiser_of(tiny_tokenizer, tiny_config, host.engine)
    ) as fleet:
        yield fleet


async def scrape(worker: Worker) -> dict[str, float]:
    text = (await worker.metrics.scrape()).decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


async def test_the_sum_of_all(fleet: Fleet) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    for worker in (one, other, other):
        await ask(worker, brief(max_steps=2))
    with pytest.raises(InvalidArgument), other.metrics.failure("rest"):
        other.lifecycle.denoiser.read({})
    shown = await scrape(one)
    assert (shown[OK], shown[BAD], shown[PASSES]) == (3, 1, 6), "of the workers"
    assert shown[TICKS] == 6, "of the engine"
    assert shown['rdt_steps_taken_bucket{le="2.0"}'] == shown["rdt_steps_taken_count"] == 3
    assert shown == {**(await scrape(other)), **{key: shown[key] for key in shown if key.startswith("process_")}}


async def test_it_is_the_same_families_as_of_one_process(fleet: Fleet) -> None:
    worker = await fleet.worker()
    alone = {family.name for family in text_string_to_metric_families(fleet.host.metrics.exposition().decode())}
    together = (await worker.metrics.scrape()).decode()
    assert {family.name for family in text_string_to_metric_families(together)} == alone


async def test_gauges_are_the_engines_and_memory_is_everybodys(fleet: Fleet) -> None:
    worker = await fleet.worker()
    fleet.host.metrics.replicas.set(7)
    worker.metrics.replicas.set(5)
    shown = await scrape(worker)
    assert shown["rdt_replicas"] == 7
    for memory in ("process_resident_memory_bytes", "process_virtual_memory_bytes"):
        own = fleet.host.metrics.registry.get_sample_value(memory)
        if own is not None:  # Linux
            assert shown[memory] > 1.5 * own, "here the worker's process is the engine's too"


async def test_open_files_are_those_of_the_process_that_has_most() -> None:
    """Each process has a limit of its own."""
    metrics = Metrics(FakeClock())
    limit = metrics.registry.get_sample_value("process_max_fds")
    if limit is None:
        pytest.skip("only Linux counts them")
    ledger = Ledger(metrics)
    ledger.book("0.0", Report(0, {}, {"process_open_fds": 100_000.0}))
    ledger.book("1.0", Report(0, {}, {"process_open_fds": 900_000.0}))
    ledger.book("2.0", Report(0, {}, {}))
    shown = (await ledger.total({})).decode()
    assert "process_open_fds 900000.0\n" in shown
    assert f"process_max_fds {limit}\n" in shown
    ledger.book("1.0", Report(0, {}, {"process_open_fds": 0.0}))
    ledger.book("0.0", Report(0, {}, {}))
    own = (await ledger.total({})).decode().partition("\nprocess_open_fds ")[2].partition("\n")[0]
    assert float(own) > 0, "the engine's own"


@pytest.mark.parametrize("engine_is", [True, False])
async def test_ready_is_the_server_that_has_a_worker_and_an_engine_that_are(engine_is: bool) -> None:
    metrics = Metrics(time.monotonic)
    metrics.watch_readiness(lambda: engine_is)
    ledger = Ledger(metrics)

    async def shown() -> bool:
        return b"\nrdt_ready 1.0\n" in await ledger.total({})

    assert not await shown(), "there is no worker"
    ledger.book("1.0", Report(0, {}, {"rdt_ready": 1.0}))
    ledger.book("2.0", Report(0, {}, {"rdt_ready": 0.0}))
    assert await shown() == engine_is
    ledger.book("1.0", Report(0, {}, {"rdt_ready": 0.0}))
    assert not await shown(), "all workers drain"


async def test_a_worker_reports_whether_it_is_ready(fleet: Fleet) -> None:
    worker = await fleet.worker()
    assert worker.metrics.report().gauges["rdt_ready"] == 1
    await worker.drain(0)
    assert worker.metrics.report().gauges["rdt_ready"] == 0


async def test_what_a_dead_worker_counted_stays(fleet: Fleet) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    await ask(one, brief())
    before = await scrape(other)
    await one.stop()
    await until(lambda: len(fleet.server._peers) == 1)
    after = await scrape(other)
    assert (before[OK], after[OK]) == (1, 1)
    await ask(other, brief())
    assert (await scrape(other))[OK] == 2


async def test_the_last_report_of_a_worker_in_good_order_has_it_all(fleet: Fleet) -> None:
    one, other = await fleet.worker(), await fleet.worker()
    await ask(one, brief())
    await one.stop()
    await until(lambda: len(fleet.server._peers) == 1)
    assert (await scrape(other))[OK] == 1


async def test_a_worker_that_was_only_cut_off_is_not_counted_twice(fleet: Fleet) -> None:
    worker = await fleet.worker()
    await ask(worker, brief())
    await scrape(worker)
    wire = worker.link.wire
    assert wire is not None
    wire.abort()
    await until(lambda: worker.link.wire is not wire and worker.lifecycle.state == "ready")
    assert (await scrape(worker))[OK] == 1


async def test_many_dead_workers_are_remembered_as_one(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "MAX_DEPARTED", 1)
    for _ in range(4):
        worker = await fleet.worker()
        await ask(worker, brief())
        await worker.stop()
    await until(lambda: not fleet.server._peers)
    assert len(fleet.server._ledger._departed) == 1
    assert (await scrape(await fleet.worker()))[OK] == 4


async def test_a_worker_that_ends_as_it_was_asked_to_is_not_lost(fleet: Fleet) -> None:
    leaving, dying, last = [await fleet.worker() for _ in range(3)]
    await leaving.drain(1)
    await leaving.stop()
    wire = dying.link.wire
    assert wire is not None
    wire.abort()
    await until(lambda: dying.link.wire not in (None, wire))
    assert (await scrape(last))["rdt_workers_lost_total"] == 1


async def test_a_new_engine_shows_no_less_than_the_last(
    fleet: Fleet, tiny_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> None:
    one, other, dead = await fleet.worker(), await fleet.worker(), await fleet.worker()
    for worker in (one, other, dead):
        await ask(worker, brief())
    await dead.stop()
    before = await scrape(one)
    await fleet.die()
    with pytest.raises(Unavailable):
        await one.metrics.scrape()

    host = OneEngine([ScriptedBackend()], LIMITS)
    again = Fleet(fleet.path, host, fleet.settings, n_workers=2)
    async with running(again, denoiser_of(tiny_tokenizer, tiny_config, host.engine)):
        await until(lambda: one.link.wire)
        after = await scrape(one)  # waits for the other one
        counts = [key for key in before if key.endswith(("_total", "_count")) and key.startswith("rdt_")]
        assert all(after[key] == before[key] for key in counts)
        await until(lambda: other.lifecycle.state == "ready")
        await ask(other, brief())
        last = await scrape(one)
        assert (last[OK], last[TICKS]) == (4, 4)


async def test_of_what_two_workers_remember_of_an_engine_the_larger_counts() -> None:
    ledger = Ledger(Metrics(FakeClock()))
    for remembered in (5.0, 3.0):
        ledger.inherit(Hello("0.0", "an engine that died", {PASSES: remembered}))
    assert ledger.base().counters[PASSES] == 5.0


async def test_what_a_worker_remembers_of_the_engine_that_is_there_is_not_added_to_it() -> None:
    ledger = Ledger(Metrics(FakeClock()))
    ledger.inherit(Hello("0.0", ledger.base().engine, {PASSES: 5.0}))
    assert ledger.base().counters[PASSES] == 0.0


async def test_a_scrape_does_not_wait_for_a_worker_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "ANSWER_SECONDS", 60.0)
    ledger, wire = Ledger(Metrics(FakeClock())), mock.Mock(spec=Wire, open=True)
    scraping = asyncio.create_task(ledger.total({"0.0": wire}))
    await asyncio.sleep(0)
    wire.open = False
    ledger.depart("0.0", lost=True)
    await asyncio.wait_for(scraping, 5)


async def test_a_report_is_for_the_engine_that_asks(fleet: Fleet) -> None:
    """A new one counts from the start: with the number of the one before, any report would pass for an answer."""
    metrics = (await fleet.worker()).metrics
    assert [metrics.report(asked).asked for asked in (9, None, 1, None, 0, None)] == [9, 9, 1, 1, 0, 0]


async def test_a_scrape_waits_for_workers_that_should_be_there(fleet: Fleet) -> None:
    """After the death of an engine they come back one by one."""
    fleet.server._ledger._n_workers = 2
    one = await fleet.worker()
    scraping = asyncio.create_task(scrape(one))
    await asyncio.sleep(0.05)
    assert not scraping.done()
    began = time.monotonic()
    await fleet.worker()
    assert (await scraping)[OK] == 0
    assert time.monotonic() - began < metering.ANSWER_SECONDS / 2


async def test_a_worker_that_does_not_report_counts_as_it_did(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metering, "ANSWER_SECONDS", 0.05)
    fleet.server._ledger._n_workers = 2
    one, other = await fleet.worker(), await fleet.worker()
    await ask(other, brief())
    await scrape(one)
    other._hear = lambda *_: None  # type: ignore[method-assign]
    other.link._hear = other._hear
    assert (await scrape(one))[OK] == 1
    assert "1 of 2 workers have reported; late: 1.0" in caplog.text


async def test_a_report_that_comes_just_as_the_scrape_gives_up_is_no_late_one(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine without processor time both are handled in the same turn."""
    monkeypatch.setattr(metering, "ANSWER_SECONDS", 0.05)
    one = await fleet.worker()
    ledger = fleet.server._ledger
    ledger._n_workers = 1
    looks = iter([True])

    monkeypatch.setattr(ledger, "_is_late", lambda *_: next(looks, False))
    monkeypatch.setattr(one.link, "_hear", lambda *_: None)
    await scrape(one)
    assert caplog.text == ""


async def test_a_worker_that_is_not_there_does_not_keep_a_scrape_for_ever(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metering, "ANSWER_SECONDS", 0.05)
    one = await fleet.worker()
    fleet.server._ledger._n_workers = 2
    await ask(one, brief())
    assert (await scrape(one))[OK] == 1
    assert "1 of 2 workers have reported; the others are not connected" in caplog.text


async def test_a_scrape_that_the_engine_does_not_answer_fails(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "SCRAPE_SECONDS", 0.05)
    one = await fleet.worker()
    monkeypatch.setattr(fleet.server, "_scrape", lambda *_: asyncio.sleep(5))
    with pytest.raises(Unavailable, match="does not answer"):
        await one.metrics.scrape()


async def test_an_engine_alone_is_shown(fleet: Fleet) -> None:
    text = await Ledger(fleet.host.metrics).total({})
    assert b"rdt_ready" in text
