"""What is particular to batches and streams over HTTP, and to the denoiser behind them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from rdt_core import RDT
from service.engine.eager import EagerBackend
from service.engine.engine import BatchingEngine
from service.engine.scheduler import SchedulerLimits
from service.errors import Internal
from service.schema import DenoiseAnswer, DenoisePass
from tests.fakes import Service
from tests.service.rest.test_bad_input import problem_of


async def test_the_shape_of_a_batch_answer(service: Service) -> None:
    items = [{"text": "the [MASK]"}, {"text": "a", "colour": 1}, 3]
    async with service.client() as client:
        response = await client.post("/denoise/batch", json={"items": items}, headers={"X-Request-Id": "mine"})
        single = await client.post("/denoise", json=items[0])
    assert response.headers["content-type"] == "application/json"
    first, second, third = response.json()["results"]
    assert first == {"answer": single.json()}
    assert second == {
        "problem": {
            "type": "urn:rdt:problem:invalid_argument",
            "title": "A field has a value that is not allowed",
            "status": 422,
            "detail": second["problem"]["detail"],
            "errors": [{"field": "items[1].colour", "message": second["problem"]["errors"][0]["message"], "value": 1}],
            "request_id": "mine",
        }
    }
    assert second["problem"]["detail"].startswith("items[1]: colour is not a field")
    assert [error["field"] for error in third["problem"]["errors"]] == ["items[2]"]


@pytest.mark.parametrize(
    ("body", "field"), [([], None), ({}, "items"), ({"items": {}}, "items"), ({"items": [], "text": "a"}, "text")]
)
async def test_a_body_that_is_no_batch(service: Service, body: object, field: str | None) -> None:
    async with service.client() as client:
        problem = problem_of(await client.post("/denoise/batch", json=body), 422)
    assert field in {None, *(error["field"] for error in problem["errors"])}
    assert service.sample("rdt_requests_total", transport="rest", outcome="invalid_argument") == 1


async def test_null_in_an_item_is_the_checkpoints_default(service: Service) -> None:
    items = [{"text": "a"}, {"text": "a", "max_steps": None}]
    async with service.client() as client:
        await client.post("/denoise/batch", json={"items": items, "max_steps": 3})
    assert [job.max_steps for job in service.engine.jobs] == [3, 8]


async def test_items_are_in_the_engine_together(service: Service) -> None:
    service.engine.held = asyncio.Event()
    items = service.denoiser.read_batch({"items": [{"text": "a"}] * 4})
    batch = asyncio.create_task(service.denoiser.denoise_batch(items, "rest"))
    await asyncio.sleep(0.01)
    assert service.engine.live == 4
    service.engine.held.set()
    assert all(isinstance(end, DenoiseAnswer) for end in await batch)


async def test_the_events_of_a_stream(service: Service) -> None:
    async with service.client() as client:
        response = await client.post("/denoise/stream", json={"text": "the\n[MASK]"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no", "nginx passes events on as they come"
    assert "content-length" not in response.headers
    frames = response.text.split("\n\n")
    assert [frame.split("\n")[0] for frame in frames] == ["event: pass", "event: pass", "event: answer", ""]
    assert frames[0].split("\n")[1] == 'data: {"step":1,"level":0.5,"text":"the\\nfox"}'
    assert service.sample("rdt_requests_total", transport="rest", outcome="ok") == 1


async def test_a_stream_that_fails_midway_ends_with_a_problem(service: Service) -> None:
    service.engine.error, service.engine.error_after_pass = Internal("broken"), 1
    async with service.client() as client:
        response = await client.post("/denoise/stream", json={"text": "a"}, headers={"X-Request-Id": "mine"})
    assert response.status_code == 200
    assert response.text.count("event: pass") == 1
    assert 'event: problem\ndata: {"type":"urn:rdt:problem:internal"' in response.text
    assert '"request_id":"mine"' in response.text


async def test_a_stream_that_is_closed_between_passes_is_cancelled(service: Service) -> None:
    service.engine.held = asyncio.Event()
    request = service.denoiser.read({"text": "a"})
    async with aclosing(service.denoiser.denoise_stream(request, "rest")) as events:
        await anext(events)
    assert (service.engine.live, service.engine.n_left) == (0, 1)
    assert service.sample("rdt_requests_total", transport="rest", outcome="cancelled") == 1


@pytest.mark.parametrize("restore", ["masked", "all"])
@pytest.mark.parametrize("halting", ["gate", "settle"])
async def test_the_text_grows_into_the_answer(service: Service, tiny_model: RDT, halting: str, restore: str) -> None:
    engine = BatchingEngine([EagerBackend(tiny_model)], SchedulerLimits(64, 4, 4, 64))
    await engine.start()
    service.denoiser.engine = engine
    text = "The [MASK][MASK] fox [MASK] over!"
    request = service.denoiser.read({"text": text, "halting": halting, "restore": restore, "threshold": 0})
    events = [event async for event in service.denoiser.denoise_stream(request, "rest")]
    *passes, answer = events
    assert isinstance(answer, DenoiseAnswer)
    assert answer.text == (await service.denoiser.denoise(request, "rest")).text
    texts = [event.text for event in passes if isinstance(event, DenoisePass)]
    assert len(texts) == answer.steps > 1
    assert texts[-1] == answer.text
    assert not any("[MASK]" in shown for shown in texts)
    if restore == "masked":
        assert all(shown.startswith("The ") and shown.endswith(" over!") for shown in texts)
    await engine.stop()
