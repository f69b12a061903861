"""The scrape itself: names, and that nobody can mint new series."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from rdt_core import RDT
from service.engine.eager import EagerBackend
from service.engine.engine import BatchingEngine
from service.engine.scheduler import SchedulerLimits
from service.errors import CODES
from service.metrics import Metrics
from tests.fakes import FakeClock, Service

NAMES = {
    "rdt_requests", "rdt_request_duration_seconds", "rdt_queue_duration_seconds", "rdt_steps_taken", "rdt_halts",
    "rdt_passes", "rdt_tokens", "rdt_live_requests", "rdt_waiting_requests", "rdt_refused", "rdt_model_info",
    "rdt_tick_duration_seconds", "rdt_tick_tokens", "rdt_decoded_rows",
    "rdt_compute_duration_seconds", "rdt_decode_seconds", "rdt_broken_ticks", "rdt_model_reloads", "rdt_ready",
    "rdt_waiting_requests_limit", "rdt_waiting_tokens", "rdt_waiting_tokens_limit", "rdt_tick_tokens_limit",
    "rdt_replicas", "rdt_out_of_memory", "rdt_workers_lost",
}  # fmt: skip


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    families = list(text_string_to_metric_families(text))
    return {(s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples}


async def test_the_scrape_has_every_metric_and_no_other(service: Service) -> None:
    async with service.client() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {name for name in families if not name.startswith("process_")} == NAMES
    assert {"process_start_time_seconds", "process_resident_memory_bytes"} < set(families)
    assert all(family.documentation for family in families.values())
    [model] = families["rdt_model_info"].samples
    assert model.labels["name"] == "tiny"


async def test_callers_cannot_mint_series(service: Service) -> None:
    bodies = [{"text": "a"}, {"text": ""}, {"text": "a " * 40}, {"text": "a", "halting": "zzz"}, {"zzz": 1}]
    async with service.client() as client:
        for body in bodies:
            await client.post("/denoise", json=body)
        await client.post("/denoise", content=b"{", headers={"Content-Type": "application/json"})
        before = series((await client.get("/metrics")).text)
        for number in range(20):
            await client.get(f"/nowhere/{number}")
            await client.post("/denoise", json={"text": "a", f"field{number}": number, "halting": f"h{number}"})
            await client.request(f"METHOD{number}", "/denoise")
        after = series((await client.get("/metrics")).text)
    assert after == before
    outcomes = {dict(labels)["outcome"] for name, labels in after if name == "rdt_requests_total"}
    assert outcomes == {"ok", *CODES} - {"failed_precondition"}


async def test_failures_outside_the_use_case_are_counted_too(service: Service) -> None:
    async with service.client() as client:
        await client.post("/denoise", content=b"{", headers={"Content-Type": "application/json"})
        await client.post("/denoise", content=b"text")
    counted = [
        service.sample("rdt_requests_total", transport="rest", outcome=o) for o in ("malformed", "unsupported_format")
    ]
    assert counted == [1, 1]


def test_gauges_follow_what_they_watch_and_events_count_one_by_one() -> None:
    metrics, engine, ready = Metrics(FakeClock()), SimpleNamespace(live=3, waiting=5, waiting_tokens=70), [True]
    metrics.watch(engine)
    metrics.watch_budget(lambda: 512)
    metrics.watch_readiness(lambda: ready[0])
    metrics.describe_bounds(SchedulerLimits(token_budget=512, max_live=8, max_waiting=16, max_waiting_tokens=400), 2)

    def now(*names: str) -> list[float | None]:
        return [metrics.registry.get_sample_value(f"rdt_{name}") for name in names]

    watched = ("live_requests", "waiting_requests", "waiting_tokens", "ready")
    assert now(*watched) == [3, 5, 70, 1]
    engine.live, engine.waiting, engine.waiting_tokens, ready[0] = 1, 0, 9, False
    assert now(*watched) == [1, 0, 9, 0]
    bounds = ("tick_tokens_limit", "waiting_requests_limit", "waiting_tokens_limit", "replicas")
    assert now(*bounds) == [512, 16, 400, 2]

    events = ("broken_ticks_total", "out_of_memory_total")
    assert now(*events) == [0, 0]
    metrics.tick_broke()
    metrics.memory_ran_out()
    metrics.memory_ran_out()
    metrics.left("grpc")
    assert now(*events) == [1, 2]
    labels = {"transport": "grpc", "outcome": "cancelled"}
    assert metrics.registry.get_sample_value("rdt_requests_total", labels) == 1


async def test_the_numbers_after_a_known_load(service: Service, tiny_model: RDT) -> None:
    """The real engine and the real backend: what was asked for is what is counted."""
    limits = SchedulerLimits(token_budget=64, max_live=8, max_waiting=16, max_waiting_tokens=400)
    engine = BatchingEngine([EagerBackend(tiny_model)], limits, watcher=service.metrics)
    await engine.start()
    service.denoiser.engine = engine
    service.metrics.watch(engine)
    texts = {"a [MASK]": 3, "the fox [MASK] [MASK]": 5, "[MASK] [MASK] [MASK] a": 1}  # passes
    n_masks, n_tokens = 6, (4, 6, 6)  # [CLS] and [SEP] included
    async with service.client() as client:
        bodies = [{"text": text, "max_steps": steps, "threshold": 0.0} for text, steps in texts.items()]
        answers = await asyncio.gather(*(client.post("/denoise", json=body) for body in bodies))
        scrape = (await client.get("/metrics")).text
    await engine.stop()
    assert [answer.json()["steps"] for answer in answers] == list(texts.values())
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
    }
    assert samples["rdt_requests_total", "ok", "rest"] == 3
    assert samples["rdt_passes_total",] == samples["rdt_steps_taken_sum",] == 9
    assert samples["rdt_halts_total", "max_steps"] == 3
    assert (samples["rdt_tokens_total", "masked"], samples["rdt_tokens_total", "visible"]) == (6, 10)
    assert samples["rdt_decoded_rows_total",] == n_masks
    assert samples["rdt_tick_tokens_sum",] == sum(n * steps for n, steps in zip(n_tokens, texts.values(), strict=True))
    assert samples["rdt_tick_tokens_count",] == samples["rdt_tick_duration_seconds_count",] >= 5
    assert 0 < samples["rdt_decode_seconds_total",] < samples["rdt_tick_duration_seconds_sum",]
    for name in ("request_duration_seconds", "queue_duration_seconds", "compute_duration_seconds", "steps_taken"):
        histogram = f"rdt_{name}"
        assert samples[f"{histogram}_count",] == 3
    assert samples["rdt_live_requests",] == samples["rdt_waiting_requests",] == 0
