"""Real models behind workers: the answers of one process, and new weights that no request notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rdt_core import checkpoint
from service.denoiser import Denoiser
from service.errors import FailedPrecondition, Unavailable
from service.hosting import Host
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.settings import Settings
from service.workers import models
from service.workers.worker import Worker
from tests.fakes import FakeClock
from tests.service.test_contract import GOOD, Rest, Rpc
from tests.service.test_hosting import let_deadlines_pass, write_other_model
from tests.service.workers.fleet import Fleet, ask, until

BRIEF = {"text": "a [MASK]", "max_steps": 3, "threshold": 0.0}
ENDLESS = {**BRIEF, "max_steps": 10**6}


class Hosted:
    """An engine's process: a host whose lifecycle is the server's."""

    def __init__(self, path: Path, folder: Path, metrics: Metrics, **changes: int) -> None:
        self.metrics = metrics
        settings = Settings(checkpoint=path, device="cpu", threads=1, replicas=2, max_steps_limit=10**6, **changes)
        self.fleet = Fleet(folder / "engine", self, settings)
        self.host = Host(settings, self.fleet.server.models, metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)


@pytest.fixture
async def hosted(path: Path, tmp_path: Path) -> AsyncIterator[Hosted]:
    hosted = Hosted(path, tmp_path, Metrics(FakeClock()))
    await hosted.fleet.server.start(hosted.fleet.path, hosted.host)
    await hosted.host.load()
    yield hosted
    for worker in hosted.fleet.workers:
        await worker.stop()
    await hosted.fleet.die()
    await hosted.host.stop()


@asynccontextmanager
async def callers(lifecycle: Lifecycle, metrics: Metrics) -> AsyncIterator[tuple[Rest, Rpc]]:
    app = create_app(lifecycle, metrics, max_body_bytes=4096)
    server = RpcServer(lifecycle, metrics, max_message_bytes=4096)
    await server.start("127.0.0.1", 0)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://rdt")
    async with client, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Rest(client), Rpc(channel)
    await server.stop(0)


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD)
async def test_a_worker_answers_as_one_process_does(hosted: Hosted, path: Path, fields: dict[str, Any]) -> None:
    """Texts, tokens, steps, levels and probabilities, to the last digit."""
    settings = Settings(checkpoint=path, device="cpu", threads=1, replicas=2, max_steps_limit=10**6)
    lifecycle = Lifecycle()
    alone = Host(settings, lifecycle, Metrics(FakeClock()))
    await alone.load()
    worker = await hosted.fleet.worker()
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(callers(lifecycle, Metrics(FakeClock())))
        there = await stack.enter_async_context(callers(worker.lifecycle, worker.metrics))
        for near, far in zip(here, there, strict=True):
            answer = untimed(await near.one(fields))
            assert answer["steps"] > 0
            assert untimed(await far.one(fields)) == answer
            assert untimed(await far.stream(fields)) == untimed(await near.stream(fields))
            batch = {"items": [fields, {"text": ""}]}
            assert untimed(await far.batch(batch)) == untimed(await near.batch(batch))
    await alone.stop()


def untimed(end: Any) -> Any:
    """An answer, or many, without the times it took."""
    if isinstance(end, list):
        return [untimed(each) for each in end]
    return {name: value for name, value in end.items() if name != "timing_ms"} if isinstance(end, dict) else end


async def test_after_a_reload_every_worker_serves_the_new_model(hosted: Hosted, path: Path) -> None:
    one, other = await hosted.fleet.worker(), await hosted.fleet.worker()
    engine = hosted.fleet.server.models.engine
    serving = hosted.fleet.server.models.serving
    assert serving is not None
    assert engine(serving.digest)
    write_other_model(path)
    change = await one.reload()
    assert change.outcome == "swapped"
    await until(lambda: hosted.host._retiring is None)
    with pytest.raises(Unavailable):
        engine(serving.digest)
    for worker in (one, other):
        assert worker.lifecycle.denoiser.card.label == change.model
        assert (await ask(worker, BRIEF)).model == change.model
    assert (await other.reload()).outcome == "unchanged"


async def test_a_file_that_cannot_be_served_leaves_all_as_it_was(hosted: Hosted, path: Path) -> None:
    worker = await hosted.fleet.worker()
    serving = worker.lifecycle.denoiser
    path.write_bytes(b"weights")
    with pytest.raises(FailedPrecondition, match="not a checkpoint"):
        await worker.reload()
    assert worker.lifecycle.denoiser is serving
    assert (await ask(worker, BRIEF)).steps == 3


async def test_a_live_request_finishes_on_the_model_it_began_with(hosted: Hosted, path: Path) -> None:
    worker = await hosted.fleet.worker()
    first, engines = worker.lifecycle.denoiser.card.label, hosted.host._engines
    long = asyncio.create_task(ask(worker, {**ENDLESS, "timeout_ms": 60_000}))
    await until(lambda: hosted.host.live == 1)
    write_other_model(path)
    change = await worker.reload()
    assert (await ask(worker, BRIEF)).model == change.model
    assert not long.done()
    let_deadlines_pass(*engines)
    assert (await long).model == first


async def test_no_request_fails_while_models_and_tokenizers_change_under_load(hosted: Hosted, path: Path) -> None:
    """Each tokenizer reads words otherwise than the one before: tokens of the one would be nonsense to the other."""
    workers = [await hosted.fleet.worker(), await hosted.fleet.worker()]
    over = asyncio.Event()
    answers: list[Any] = []

    async def caller(worker: Worker) -> None:
        while not over.is_set():
            answers.append(await ask(worker, BRIEF))

    async with asyncio.TaskGroup() as tasks:
        for worker in workers * 2:
            tasks.create_task(caller(worker))
        labels = [workers[0].lifecycle.denoiser.card.label]
        for turn, d_ff in enumerate((24, 40, 48)):
            write_other_model(path, d_ff=d_ff)
            turn_words(path)
            labels.append((await workers[turn % 2].reload()).model)
            n_before = len(answers)
            await until(lambda n=n_before: len(answers) >= n + 8)
            await until(lambda: hosted.host._retiring is None)
        over.set()
    assert list(dict.fromkeys(answer.model for answer in answers)) == labels
    vocabularies = {worker._tokenizer.json for worker in workers if worker._tokenizer is not None}
    assert vocabularies == {checkpoint.read(path).tokenizer}


def turn_words(path: Path) -> None:
    """The words "fox" and "dog" change places."""
    held = checkpoint.read(path)
    swapped = held.tokenizer.replace('"fox"', '"turned"').replace('"dog"', '"fox"').replace('"turned"', '"dog"')
    assert swapped != held.tokenizer
    checkpoint.save(path, replace(held, tokenizer=swapped))


async def test_the_old_model_stays_until_every_worker_has_left_it(hosted: Hosted, path: Path) -> None:
    """A request on its way from a worker that has not heard of the new one is served by the old one."""
    quick, slow = await hosted.fleet.worker(), await hosted.fleet.worker()
    old = slow.lifecycle.denoiser
    hear, kept = slow._hear, list[Any]()
    slow.link._hear = lambda *heard: kept.append(heard)
    write_other_model(path)
    reload = asyncio.create_task(quick.reload())
    await until(lambda: kept and quick.lifecycle.denoiser.card.label != old.card.label)
    await asyncio.sleep(0.05)
    assert (await ask(slow, BRIEF)).model == old.card.label
    assert not reload.done()
    slow.link._hear = hear
    for heard in kept:
        hear(*heard)
    change = await reload
    assert (await ask(slow, BRIEF)).model == change.model
    await until(lambda: hosted.host._retiring is None)


async def test_a_worker_that_does_not_move_on_is_cut_off_and_comes_back(
    hosted: Hosted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "ADOPTION_SECONDS", 0.5)
    quick, stuck = await hosted.fleet.worker(), await hosted.fleet.worker()
    hear = stuck._hear
    stuck.link._hear = lambda *_: None
    wire = stuck.link.wire
    write_other_model(path)
    change = await quick.reload()
    stuck.link._hear = hear
    server = hosted.fleet.server  # which may cut it off once more, if it comes back late
    await until(lambda: stuck.link.wire is not wire and len(server._peers) == 2 and not server.models._behind())
    assert (await ask(stuck, BRIEF)).model == change.model


async def test_a_worker_that_leaves_does_not_stop_the_reload_it_asked_for(hosted: Hosted, path: Path) -> None:
    one, other = await hosted.fleet.worker(), await hosted.fleet.worker()
    write_other_model(path)
    asked = asyncio.create_task(one.reload())
    await until(lambda: hosted.fleet.server._reloads)
    asked.cancel()
    await one.stop()
    await until(lambda: other.lifecycle.denoiser.card.name == "other")


async def test_no_model_no_requests(path: Path, tmp_path: Path) -> None:
    hosted = Hosted(path, tmp_path, Metrics(FakeClock()))
    await hosted.fleet.server.start(hosted.fleet.path, hosted.host)
    worker = Worker(hosted.fleet.settings, "0.0", hosted.fleet.path)
    worker.start()
    await until(lambda: worker.link.status.state == "loading")
    assert worker.lifecycle.state == "loading"
    assert b"rdt_ready 0.0" in await worker.metrics.scrape()
    await hosted.host.load()
    await until(lambda: worker.lifecycle.state == "ready")
    await worker.stop()
    await hosted.fleet.die()
    await hosted.host.stop()


async def test_a_batch_of_any_size_goes_through_a_reload(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its items are handed in over more turns of the event loop than a single request needs."""
    hosted = Hosted(path, tmp_path, Metrics(FakeClock()), max_batch_items=1024, max_waiting=2000)
    await hosted.fleet.server.start(hosted.fleet.path, hosted.host)
    await hosted.host.load()
    worker = await hosted.fleet.worker()
    denoiser = worker.lifecycle.denoiser
    items = denoiser.read_batch({"items": [BRIEF] * 1024})
    batches, opens = [], worker.lifecycle.open

    def swap(new: Denoiser) -> Denoiser | None:
        """A batch has come for the old model just before."""
        batches.append(asyncio.create_task(denoiser.denoise_batch(items, "rest")))
        return opens(new)

    monkeypatch.setattr(worker.lifecycle, "open", swap)
    write_other_model(path)
    assert (await worker.reload()).outcome == "swapped"
    [ends] = await asyncio.gather(*batches)
    assert [end for end in ends if isinstance(end, Exception)] == []
    await worker.stop()
    await hosted.fleet.die()
    await hosted.host.stop()
