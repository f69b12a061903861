"""New weights without a gap: the real engine on tiny checkpoints, and files that cannot be served."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rdt_core import RDT, Checkpoint, Encoding, LoadedModel, ModelConfig, Tokenizer, checkpoint
from rdt_core.tokenizer import LONG_TEXT
from service import hosting, loading
from service.engine.engine import BatchingEngine
from service.errors import FailedPrecondition, Unavailable
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.loading import load_model
from service.metrics import Metrics
from service.rest.app import create_app
from service.runtime import Reloader
from service.settings import Settings
from tests.fakes import FakeClock
from tests.service.workers.fleet import until

ADMIN_KEY, API_KEY = "adm1n", "s3cret"
ENDLESS = {"text": "a [MASK]", "max_steps": 10**6, "threshold": 0.0}
BRIEF = {"text": "a [MASK]", "max_steps": 3, "threshold": 0.0}


class Hosted:
    """A host of a tiny model, and the HTTP interface over it."""

    def __init__(
        self, path: Path, api_key: str | None = None, admin_key: str | None = ADMIN_KEY, devices: str = ""
    ) -> None:
        self.settings = Settings(
            checkpoint=path, device="cpu", devices=devices, threads=1, replicas=2, max_steps_limit=10**6
        )
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(FakeClock())
        self.host = Host(self.settings, self.lifecycle, self.metrics)
        self.app = create_app(
            self.lifecycle, self.metrics, max_body_bytes=4096, api_key=api_key, admin_key=admin_key,
            reload=self.host.reload,
        )  # fmt: skip

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://rdt") as client:
            yield client

    async def denoise(self, fields: dict[str, Any]) -> Any:
        denoiser = self.lifecycle.denoiser
        return await denoiser.denoise(denoiser.read(fields), "rest")

    def sample(self, name: str, /, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def hosted(path: Path) -> AsyncIterator[Hosted]:
    hosted = Hosted(path)
    await hosted.host.load()
    yield hosted
    await hosted.host.stop()


def let_deadlines_pass(*engines: BatchingEngine) -> None:
    """Those of all that is in the engines, at once."""
    for engine in engines:
        engine._clock = lambda: time.monotonic() + 3600


def write_other_model(path: Path, **changes: Any) -> None:
    """Another model of the same tokenizer in the file's place, as the trainer leaves one."""
    held = checkpoint.read(path)
    config = ModelConfig.from_mapping(held.config["model"]).with_changes(**changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = RDT(config).state_dict()
    checkpoint.save(path, Checkpoint(weights, {"model": config.to_mapping(), "name": "other"}, held.tokenizer))


async def test_a_live_request_finishes_on_the_model_it_began_with(hosted: Hosted, path: Path) -> None:
    first, engines = hosted.lifecycle.denoiser, hosted.host._engines
    long = asyncio.create_task(hosted.denoise({**ENDLESS, "timeout_ms": 60_000}))
    await until(lambda: hosted.host.live == 1)
    write_other_model(path)
    change = await hosted.host.reload()
    assert (change.outcome, change.previous) == ("swapped", first.card.label)
    assert change.model.startswith("other@")

    newcomer = await hosted.denoise(BRIEF)
    assert not long.done(), "the two models compute side by side"
    assert newcomer.model == change.model
    with pytest.raises(FailedPrecondition, match="not over"):
        await hosted.host.reload()
    let_deadlines_pass(*engines)
    answer = await long
    assert (answer.model, answer.halt_reason) == (first.card.label, "deadline")
    await until(lambda: not first.engine.ready)
    assert hosted.host.live == 0
    assert hosted.sample("rdt_model_info", **_labels(hosted)) == 1


def _labels(hosted: Hosted) -> dict[str, str]:
    card = hosted.lifecycle.denoiser.card
    return {"name": card.name, "digest": card.digest, "device": card.device, "precision": card.precision}


async def test_no_request_fails_while_models_change_under_load(hosted: Hosted, path: Path) -> None:
    """Callers that never stop, and five reloads; each answer names the model that gave it."""
    over = asyncio.Event()
    answers: list[Any] = []

    async def caller(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            response = await client.post("/denoise", json=BRIEF)
            assert response.status_code == 200, response.text
            answers.append(response.json())

    async with hosted.client() as client, asyncio.TaskGroup() as callers:
        for _ in range(4):
            callers.create_task(caller(client))
        labels = [hosted.lifecycle.denoiser.card.label]
        for d_ff in (24, 40, 48, 56, 64):
            write_other_model(path, d_ff=d_ff)
            labels.append((await hosted.host.reload()).model)
            n_before = len(answers)
            await until(lambda n=n_before: len(answers) >= n + 8)
            await until(lambda: hosted.host._retiring is None)
        over.set()
    assert len(set(labels)) == 6
    assert list(dict.fromkeys(answer["model"] for answer in answers)) == labels, "in this order, and no other"
    assert hosted.sample("rdt_model_reloads_total", outcome="swapped") == 5
    assert hosted.sample("rdt_requests_total", transport="rest", outcome="ok") == len(answers)


async def test_the_old_model_does_not_stay_in_memory(hosted: Hosted, path: Path) -> None:
    old = weakref.ref(hosted.lifecycle.denoiser.engine)
    await hosted.denoise(BRIEF)
    write_other_model(path)
    await hosted.host.reload()
    await hosted.denoise(BRIEF)
    await until(lambda: hosted.host._retiring is None)
    assert old() is None, "gone at once: what is frozen is never collected"


async def test_the_old_model_does_not_stay_for_an_error_on_its_way(hosted: Hosted, path: Path) -> None:
    old = weakref.ref(hosted.lifecycle.denoiser.engine)
    items = hosted.lifecycle.denoiser.read_batch({"items": [{}, ENDLESS]})
    batch = asyncio.create_task(hosted.lifecycle.denoiser.denoise_batch(items, "rest"))
    await until(lambda: hosted.host.live == 1)
    write_other_model(path)
    await hosted.host.reload()
    batch.cancel()
    await asyncio.wait([batch])
    del batch, items
    await until(lambda: hosted.host._retiring is None)
    assert old() is None


async def test_several_devices_are_fed_from_one_queue(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model once on each; here they are all the same CPU."""
    asked: list[str] = []

    def load_on_cpu(file: Path, device: str, precision: Any) -> Any:
        asked.append(device)
        return load_model(file, "cpu", precision)

    monkeypatch.setattr(loading, "load_model", load_on_cpu)
    several = Hosted(path, devices="0,2")
    await several.host.load()
    assert asked == ["cuda:0", "cuda:2"]
    assert several.lifecycle.denoiser.card.device == "cuda:0,cuda:2"
    assert several.sample("rdt_replicas") == 4, "two on each"
    answers = await asyncio.gather(*(several.denoise(BRIEF) for _ in range(8)))
    assert {answer.text for answer in answers} == {answers[0].text}
    await several.host.stop()


def test_replicas_leave_each_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "usable_cores", lambda: 5)
    cpu = torch.device("cpu")
    assert [hosting.default_replicas(cpu, threads) for threads in (1, 2, 5, 8)] == [5, 2, 1, 1]
    assert hosting.default_replicas(torch.device("cuda"), 2) == 1


async def test_the_same_file_changes_nothing(hosted: Hosted) -> None:
    serving = hosted.lifecycle.denoiser
    assert (await hosted.host.reload()).outcome == "unchanged"
    assert hosted.lifecycle.denoiser is serving
    assert hosted.sample("rdt_model_reloads_total", outcome="unchanged") == 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.write_bytes(b"weights"), "not a checkpoint"),
        (lambda path: write_other_model(path, max_seq_len=100_000), "token_budget is 512"),
    ],
)
async def test_a_bad_file_leaves_the_old_model_serving_and_says_why(
    hosted: Hosted, path: Path, spoil: Callable[[Path], object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    serving = hosted.lifecycle.denoiser
    spoil(path)
    with pytest.raises(FailedPrecondition, match=why):
        await hosted.host.reload()
    assert why in caplog.text
    assert hosted.lifecycle.denoiser is serving
    assert (await hosted.denoise(BRIEF)).model == serving.card.label
    assert hosted.sample("rdt_model_reloads_total", outcome="failed") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("a broken kernel"), "a broken kernel"),
        (RuntimeError("out of memory"), "there is memory for texts of 0 tokens only"),
        (IndexError("a defect"), "a defect"),
    ],
)
async def test_a_model_that_breaks_while_warming_is_not_served(
    hosted: Hosted, path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    serving, read = hosted.lifecycle.denoiser, loading.read_models
    refused: list[weakref.ref[RDT]] = []
    write_other_model(path)

    def breaks(*_: object) -> None:
        raise type(error)(*error.args)

    def noted(settings: Settings) -> list[LoadedModel]:
        models = read(settings)
        refused.append(weakref.ref(models[0].model))
        return models

    monkeypatch.setattr(RDT, "forward", breaks)
    monkeypatch.setattr(hosting, "read_models", noted)
    with pytest.raises(FailedPrecondition, match=said):
        await hosted.host.reload()
    monkeypatch.undo()
    assert hosted.lifecycle.denoiser is serving
    if isinstance(error, RuntimeError):  # the log of this test keeps the traceback of a defect
        await until(lambda: refused[0]() is None)  # the thread that read it may hold it for a moment
    assert hosted.sample("rdt_model_reloads_total", outcome="failed") == 1
    assert hosted.sample("rdt_tick_tokens_limit") == 512, "of the model that serves"
    assert hosted.sample("rdt_out_of_memory_total") == 0
    assert (await hosted.denoise(BRIEF)).steps == 3
    assert (await hosted.host.reload()).outcome == "swapped", "and the next try is not stuck behind the failed one"


async def test_a_model_with_a_table_of_positions_is_served(hosted: Hosted, path: Path) -> None:
    """No tick that warms it has a longer text than it takes, though the budget is larger."""
    write_other_model(path, norm="post", positions="learned", max_seq_len=24)
    assert (await hosted.host.reload()).outcome == "swapped"
    assert (await hosted.denoise(BRIEF)).steps == 3


async def test_a_drain_finishes_both_models(hosted: Hosted, path: Path) -> None:
    old = asyncio.create_task(hosted.denoise({**ENDLESS, "timeout_ms": 60_000}))
    await until(lambda: hosted.host.live == 1)
    write_other_model(path)
    await hosted.host.reload()
    new = asyncio.create_task(hosted.denoise({**ENDLESS, "timeout_ms": 60_000}))
    await until(lambda: hosted.host.live == 2)
    draining = asyncio.create_task(hosted.host.drain(60))
    await until(lambda: hosted.lifecycle.state == "draining")
    let_deadlines_pass(*hosted.host._engines)
    await draining
    assert [task.result().halt_reason for task in (old, new)] == ["deadline", "deadline"]
    with pytest.raises(Unavailable):
        await hosted.host.reload()


async def test_nothing_to_reload_while_loading(path: Path) -> None:
    with pytest.raises(Unavailable, match="loading"):
        await Hosted(path).host.reload()


async def test_hangups_are_not_lost(path: Path) -> None:
    """What comes while a model loads, or while the old one finishes, is done after it."""
    hosted = Hosted(path)
    hang_up = Reloader(hosted.host)
    hang_up()
    await hosted.host.load()
    await until(lambda: hosted.sample("rdt_model_reloads_total", outcome="unchanged") == 1)

    endless = asyncio.create_task(hosted.denoise(ENDLESS))
    await until(lambda: hosted.host.live == 1)
    write_other_model(path)
    hang_up()
    await until(lambda: hosted.host._retiring is not None)
    path.write_bytes(b"no checkpoint")
    for _ in range(3):
        hang_up()
    await asyncio.sleep(0.05)
    assert hosted.sample("rdt_model_reloads_total", outcome="failed") == 0, "the old model still finishes"
    endless.cancel()
    await until(lambda: hosted.sample("rdt_model_reloads_total", outcome="failed") == 1)
    await hosted.host.at_rest()
    assert hosted.sample("rdt_model_reloads_total", outcome="swapped") == 1
    assert hosted.sample("rdt_model_reloads_total", outcome="failed") == 1, "three that wait are one"
    await hosted.host.stop()


async def test_over_rest_with_the_admin_key(path: Path) -> None:
    hosted = Hosted(path, api_key=API_KEY)
    await hosted.host.load()
    async with hosted.client() as client:
        for headers in ({}, {"X-API-Key": API_KEY}, {"Authorization": "Bearer wrong"}):
            assert (await client.post("/model/reload", headers=headers)).status_code == 401
        admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert (await client.post("/model/reload", headers=admin)).json()["outcome"] == "unchanged"
        write_other_model(path)
        answer = (await client.post("/model/reload", headers=admin)).json()
        assert answer["outcome"] == "swapped"
        os.remove(path)
        await until(lambda: hosted.host._retiring is None)
        problem = await client.post("/model/reload", headers={"X-API-Key": ADMIN_KEY})
        assert (problem.status_code, problem.headers["content-type"]) == (409, "application/problem+json")
        assert problem.json()["detail"] == (
            f"the checkpoint cannot be served, {answer['model']} stays: {path}: no such file"
        )
    await hosted.host.stop()


async def test_off_by_default(path: Path) -> None:
    hosted = Hosted(path, admin_key=None)
    async with hosted.client() as client:
        assert (await client.post("/model/reload")).status_code == 404
        assert "/model/reload" not in (await client.get("/openapi.json")).json()["paths"]


async def test_a_tick_that_breaks_during_a_reload_puts_no_stopped_engine_in_place(
    hosted: Hosted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old engine is down when the new one is warm, and back a moment later."""
    old, warm = hosted.lifecycle.denoiser, hosted.host._warm_engine

    async def warmed(*loaded: Any) -> BatchingEngine:
        engine = await warm(*loaded)
        hosted.host._engine._broken = True  # type: ignore[union-attr]
        asyncio.get_running_loop().call_soon(setattr, hosted.host._engine, "_broken", False)
        return engine

    monkeypatch.setattr(hosted.host, "_warm_engine", warmed)
    write_other_model(path)
    with pytest.raises(Unavailable):
        await hosted.host.reload()
    assert hosted.lifecycle.denoiser is old
    assert (await hosted.denoise(BRIEF)).steps == 3
    monkeypatch.undo()
    assert (await hosted.host.reload()).outcome == "swapped"
    assert (await hosted.denoise(BRIEF)).model != old.card.label


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_long_text_that_was_accepted_before_the_end_is_answered(
    path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """It is tokenised beside the event loop, and the engine knows nothing of it yet; nor does a later one."""
    hosted = Hosted(path)
    await hosted.host.load()
    encode, may_go_on = Tokenizer.encode, threading.Event()

    def slow(tokenizer: Tokenizer, text: str) -> Encoding:
        assert len(text) <= LONG_TEXT or may_go_on.wait(5)
        return encode(tokenizer, text.rstrip())

    monkeypatch.setattr(Tokenizer, "encode", slow)
    limits = replace(hosted.lifecycle.denoiser.limits, max_seq_len=100)
    monkeypatch.setattr(hosted.lifecycle.denoiser, "limits", limits)
    asking = asyncio.create_task(hosted.denoise({"text": f"a [MASK]{' ' * LONG_TEXT}"}))
    await asyncio.sleep(0.02)
    label = hosted.lifecycle.denoiser.card.label
    if replaced:
        write_other_model(path)
        assert (await hosted.host.reload()).outcome == "swapped"
    draining = asyncio.create_task(hosted.host.drain(10))
    await asyncio.sleep(0.02)
    assert not draining.done()
    may_go_on.set()
    await draining
    assert (await asking).model == label
    await hosted.host.stop()
