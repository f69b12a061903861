"""More callers than the bounds, at once: what is over is refused at once, what is accepted is answered."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest

from service import limits
from service.engine.engine import BatchingEngine
from service.engine.scheduler import SchedulerLimits
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from tests.fakes import MAX_BODY_BYTES, Service
from tests.service.engine.scripted import HeldBackend

MAX_LIVE, MAX_WAITING, N_EACH = 2, 5, 12
N_ACCEPTED = 1 + MAX_WAITING  # the first is alone in its tick, which stands still
FIELDS = {"text": "a [MASK]", "max_steps": 3, "threshold": 0.0}


@pytest.fixture
def held() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
async def engine(service: Service, held: HeldBackend) -> AsyncIterator[BatchingEngine]:
    engine = BatchingEngine([held], SchedulerLimits(32, MAX_LIVE, MAX_WAITING, 1000), watcher=service.metrics)
    await engine.start()
    service.denoiser.engine = engine
    service.metrics.watch(engine)
    yield engine
    held.let_go(200)
    await engine.stop()


async def by_rest(client: httpx.AsyncClient) -> str:
    response = await client.post("/denoise", json=FIELDS)
    return {200: "ok", 429: "resource_exhausted"}[response.status_code]


async def by_rpc(stub: DenoiserStub) -> str:
    try:
        await stub.Denoise(pb.DenoiseRequest(**FIELDS))
    except grpc.aio.AioRpcError as error:
        return error.code().name.lower()
    return "ok"


async def test_more_than_the_bounds(service: Service, engine: BatchingEngine, held: HeldBackend) -> None:
    async with service.client() as client, service.channel() as channel:
        first = asyncio.create_task(by_rest(client))
        await asyncio.to_thread(held.wait_until_started)
        stub = DenoiserStub(channel)
        rest = [first, *(asyncio.create_task(by_rest(client)) for _ in range(N_EACH - 1))]
        rpc = [asyncio.create_task(by_rpc(stub)) for _ in range(N_EACH)]
        everybody = [*rest, *rpc]
        n_refused = len(everybody) - N_ACCEPTED

        async with asyncio.timeout(10):  # while the engine stands still
            while sum(task.done() for task in everybody) < n_refused:
                await asyncio.sleep(0.005)
        assert {task.result() for task in everybody if task.done()} == {"resource_exhausted"}
        assert (engine.live, engine.waiting) == (1, MAX_WAITING)

        held.let_go(100)
        async with asyncio.timeout(10):
            ends = await asyncio.gather(*everybody)
    assert Counter(ends) == {"ok": N_ACCEPTED, "resource_exhausted": n_refused}
    for transport, tasks in (("rest", rest), ("grpc", rpc)):
        for outcome, n in Counter(task.result() for task in tasks).items():
            assert service.sample("rdt_requests_total", transport=transport, outcome=outcome) == n
    assert service.sample("rdt_refused_total", reason="queue_requests") == n_refused
    assert service.sample("rdt_passes_total") == 3 * N_ACCEPTED
    assert service.sample("rdt_queue_duration_seconds_count") == N_ACCEPTED
    assert (service.sample("rdt_live_requests"), service.sample("rdt_waiting_requests")) == (0, 0)


async def test_the_items_of_a_batch_meet_the_same_bounds(
    service: Service, engine: BatchingEngine, held: HeldBackend
) -> None:
    async with service.client() as client:
        first = asyncio.create_task(by_rest(client))
        await asyncio.to_thread(held.wait_until_started)
        batches = [asyncio.create_task(client.post("/denoise/batch", json={"items": [FIELDS] * 4})) for _ in range(2)]
        async with asyncio.timeout(10):
            while service.sample("rdt_refused_total", reason="queue_requests") < 3:
                await asyncio.sleep(0.005)
            assert engine.waiting == MAX_WAITING
            held.let_go(100)
            answers = [answer.json()["results"] for answer in await asyncio.gather(*batches)]
        assert await first == "ok"
    ends = Counter(next(iter(result)) for results in answers for result in results)
    assert ends == {"answer": MAX_WAITING, "problem": 3}
    refused = [result["problem"] for results in answers for result in results if "problem" in result]
    assert {problem["status"] for problem in refused} == {429}


async def test_what_is_wrong_with_an_item_is_not_kept_while_others_wait(service: Service) -> None:
    """A body's values take many times its bytes."""
    service.engine.held = asyncio.Event()
    body = b'{"items": [{"text": "a [MASK]"}, {"text": "a", "unheard-of": [[], {}]}]}'
    async with service.client() as client:
        headers = {"Content-Type": "application/json"}
        asked = asyncio.create_task(client.post("/denoise/batch", content=body, headers=headers))
        await service.until_live(1)
        assert [kept for kept in gc.get_objects() if type(kept) is dict and "unheard-of" in kept] == []
        service.engine.held.set()
        assert [*map(len, (await asked).json()["results"])] == [1, 1]


async def test_the_bodies_of_all_requests_have_a_bound_together(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many callers send slowly. A body of a few bytes is taken all the same."""
    monkeypatch.setattr(limits, "MOST_BODIES", 3)
    monkeypatch.setattr(limits, "FEW_BYTES", 100)
    go_on, n_slow = asyncio.Event(), 0

    async def slowly() -> AsyncIterator[bytes]:
        nonlocal n_slow
        yield b'{"text": "a [MASK]"'.ljust(MAX_BODY_BYTES - 1)
        n_slow += 1
        await go_on.wait()
        yield b"}"

    async with service.client() as client:

        async def post() -> httpx.Response:
            return await client.post("/denoise", content=slowly(), headers={"Content-Type": "application/json"})

        slow = [asyncio.create_task(post()) for _ in range(3)]
        async with asyncio.timeout(10):
            while n_slow < 3:
                await asyncio.sleep(0.005)
            refused = await post()
            assert (await client.post("/denoise", json={"text": "a [MASK]"})).status_code == 200
            assert service.sample("rdt_refused_total", reason="bodies") == 1
            go_on.set()
            assert [(await task).status_code for task in slow] == [200, 200, 200]
            assert [(await post()).status_code for _ in range(4)] == [200] * 4, "there is room again"
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    problem = refused.json()
    assert problem["title"] == "Too much is being sent at once"
    assert problem["detail"].startswith(f"the bodies of all requests under way have over {3 * MAX_BODY_BYTES} bytes: ")
