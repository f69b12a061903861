from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.client import AsyncClient, Client, ProblemError
from service.errors import Internal, ResourceExhausted
from service.schema import DenoiseAnswer, TimingMs
from tests.fakes import Service


async def test_an_answer_and_a_problem(service: Service) -> None:
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        assert await client.ready()
        assert (await client.denoise("the [MASK]", max_steps=3)).text == "the fox"
        assert (await client.model()).name == "tiny"
        with pytest.raises(ProblemError, match="max_steps is 0") as error:
            await client.denoise("the [MASK]", max_steps=0)
    assert error.value.problem.status == 422
    assert [bad.field for bad in error.value.problem.errors] == ["max_steps"]


async def test_a_problem_gets_to_other_processes(service: Service) -> None:
    """A pool whose worker raises what cannot be read again is broken, or waits for ever."""
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        with pytest.raises(ProblemError) as error:
            await client.denoise("the [MASK]", max_steps=0)
    arrived = pickle.loads(pickle.dumps(error.value))
    assert arrived.problem == error.value.problem
    assert str(arrived) == str(error.value)


async def test_what_json_cannot_say_is_the_servers_to_refuse(service: Service) -> None:
    """In a batch it is one item's fault: a text read with `surrogateescape` spoiled all others."""
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        good, bad, worse = await client.denoise_batch(
            ["狐 [MASK]", "a\udcff [MASK]", {"text": "a", "threshold": math.nan}]
        )
        for call in (client.denoise("\udcff"), anext(aiter(client.denoise_stream("\udcff")))):
            with pytest.raises(ProblemError, match="want text without lone surrogates"):
                await call
    assert good.answer is not None
    assert good.answer.text == "狐 fox"
    assert bad.problem is not None
    assert [field.field for field in bad.problem.errors] == ["items[1].text"]
    assert worse.problem is not None
    assert worse.problem.detail == "items[2]: threshold is NaN: want a finite number >= 0"


async def test_who_is_refused_is_told_when_to_try_again(service: Service) -> None:
    service.engine.full = ResourceExhausted("short", "memory")
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        with pytest.raises(ProblemError) as full:
            await client.denoise("a")
        with pytest.raises(ProblemError) as wrong:
            await client.denoise("a", top_k=-1)
    assert (full.value.retry_seconds, wrong.value.retry_seconds) == (60, None)
    assert pickle.loads(pickle.dumps(full.value)).retry_seconds == 60


@pytest.mark.parametrize("when", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1.5", "9" * 5000, ""])
def test_a_proxy_may_say_when_in_other_ways(when: str) -> None:
    busy = httpx.Response(503, text="busy", headers={"Retry-After": when})
    transport = httpx.MockTransport(lambda _: busy)
    with Client("http://rdt", transport=transport) as client, pytest.raises(ProblemError) as error:
        client.denoise("a")
    assert error.value.retry_seconds is None


async def test_a_batch_and_a_stream(service: Service) -> None:
    async with AsyncClient("http://rdt", transport=httpx.ASGITransport(service.app)) as client:
        first, second = await client.denoise_batch(["the [MASK]", {"text": "a", "max_steps": 0}], max_steps=3)
        assert first.answer is not None
        assert (first.answer.text, first.answer.max_steps, first.problem) == ("the fox", 3, None)
        assert second.problem is not None
        assert (second.answer, second.problem.errors[0].field) == (None, "items[1].max_steps")
        *passes, answer = [event async for event in client.denoise_stream("the [MASK]")]
        assert [event.text for event in (*passes, answer)] == ["the fox"] * 3
        with pytest.raises(ProblemError, match="max_steps is 0"):
            await anext(aiter(client.denoise_stream("a", max_steps=0)))
        service.engine.error, service.engine.error_after_pass = Internal("broken"), 1
        events = client.denoise_stream("a")
        await anext(events)
        with pytest.raises(ProblemError, match="500"):
            await anext(events)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_streamed_text_may_hold_other_ends_of_lines(size: int) -> None:
    text = "a\u2028b\u2029c\u0085d\x0be"
    events = f"event: pass\ndata: {json.dumps({'step': 1, 'level': 0.5, 'text': text}, ensure_ascii=False)}\n\n" * 2
    content = events.encode()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=iter(pieces)))
    with Client("http://rdt", transport=transport) as client:
        stream = client.denoise_stream("a")
        assert [next(stream).text, next(stream).text] == [text, text]


class Slowly(httpx.SyncByteStream):
    """A body that has not been read when its head has."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces


def test_the_sync_clients_batch_and_stream() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/denoise/batch":
            assert json.loads(request.content) == {"items": [{"text": "a"}], "top_k": 1}
            return httpx.Response(200, json={"results": []})
        if b"bad" in request.content:
            return httpx.Response(503, stream=Slowly([b"do", b"wn"]))
        return httpx.Response(200, text='event: pass\ndata: {"step":1,"level":0.5,"text":"b"}\n\n')

    with Client("http://rdt", transport=httpx.MockTransport(answer)) as client:
        assert client.denoise_batch(["a"], top_k=1) == []
        assert next(client.denoise_stream("a")).text == "b"
        with pytest.raises(ProblemError, match="503 Service Unavailable: down"):
            next(client.denoise_stream("bad"))


def test_the_sync_client_sends_its_key_and_reads_foreign_errors() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer open sesame"
        return httpx.Response(502, text="<h1>Bad gateway</h1>")

    with Client("http://rdt", api_key="open sesame", transport=httpx.MockTransport(answer)) as client:
        assert not client.ready()
        with pytest.raises(ProblemError, match="502 Bad Gateway: <h1>"):
            client.denoise("a")


@pytest.mark.parametrize("key", ["", "s3cret\n", " s3cret", "s3crét"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(kind: type[Client | AsyncClient], key: str) -> None:
    """httpx names the whole header: a key from a file, with the end of its line, would be in a log."""
    with pytest.raises(ValueError, match=r"^api_key: want at least one character, ") as error:
        kind("http://rdt", api_key=key)
    assert "s3cr" not in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.parametrize("charset", ["utf-16", "hex", "idna", "rot13", "none"])
def test_a_proxy_may_name_any_charset(charset: str) -> None:
    page = httpx.Response(502, content=b"<h1>\xff down", headers={"Content-Type": f"text/html; charset={charset}"})
    with Client("http://rdt", transport=httpx.MockTransport(lambda _: page)) as client:
        with pytest.raises(ProblemError, match="502 Bad Gateway: <h1>"):
            client.denoise("a")
        with pytest.raises(ProblemError, match="502 Bad Gateway: <h1>"):
            next(client.denoise_stream("a"))


CUT = {
    "nothing": b"",
    "a page": b"<html>upstream says hello</html>",
    "a pass and no more": b'event: pass\ndata: {"step": 1, "level": 0.5, "text": "a"}\n\n',
    "half an event": b'event: answer\ndata: {"te',
}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
async def test_a_stream_without_an_answer_is_no_end(content: bytes) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
    cut = pytest.raises(httpx.RemoteProtocolError, match="ended without an answer")
    with Client("http://rdt", transport=transport) as client, cut:
        list(client.denoise_stream("a"))
    async with AsyncClient("http://rdt", transport=transport) as client:
        with cut:
            [event async for event in client.denoise_stream("a")]


async def test_an_answer_that_is_none_is_the_wires_fault() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    with Client("http://rdt", transport=transport) as client:
        for call in (lambda: client.denoise("a"), lambda: client.denoise_batch(["a"]), client.model):
            with pytest.raises(httpx.RemoteProtocolError, match="the server's answer is no"):
                call()
    async with AsyncClient("http://rdt", transport=transport) as client:
        for waiting in (client.denoise("a"), client.denoise_batch(["a"]), client.model()):
            with pytest.raises(httpx.RemoteProtocolError, match="the server's answer is no"):
                await waiting


@pytest.mark.parametrize("items", ["abc", {"text": "a"}, b"abc"])
def test_one_text_is_no_batch(items: Any) -> None:
    with Client("http://rdt") as client, pytest.raises(TypeError, match="want several texts"):
        client.denoise_batch(items)


@pytest.mark.parametrize("item", [None, 0.5, b"abc", ("text", "a")])
def test_an_item_that_is_no_text_is_named(item: Any) -> None:
    kind = type(item).__name__
    with Client("http://rdt") as client, pytest.raises(TypeError, match=rf"items\[1\] is a {kind}: want a text"):
        client.denoise_batch(["a", item])


async def test_a_caller_is_waited_for_as_long_as_it_allows() -> None:
    waited: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        waited.append(request.extensions["timeout"]["read"])
        return httpx.Response(503, text="down")

    transport = httpx.MockTransport(answer)
    with Client("http://rdt", timeout_seconds=10, transport=transport) as client:
        for options in ({}, {"timeout_ms": 90_000}, {"timeout_ms": 10}, {"timeout_ms": "soon"}, {"timeout_ms": None}):
            with pytest.raises(ProblemError):
                client.denoise("a", **options)
        with pytest.raises(ProblemError):
            next(client.denoise_stream("a", timeout_ms=90_000))
    async with AsyncClient("http://rdt", timeout_seconds=10, transport=transport) as client:
        with pytest.raises(ProblemError):
            await client.denoise_batch(["a"], timeout_ms=90_000)
        with pytest.raises(ProblemError):
            await client.denoise_batch(["a", {"text": "b", "timeout_ms": 120_000}], timeout_ms=90_000)
        with pytest.raises(ProblemError):
            await client.denoise("a", timeout_ms=10**400)
    assert waited == [10, 95, 10, 10, 10, 95, 95, 125, 86_405]


def test_events_of_a_later_server_and_of_a_proxy_are_read() -> None:
    """Names that are not known are left out, and lines may end in two characters."""
    answer = DenoiseAnswer(
        text="a", steps=1, max_steps=1, halt_reason="gate", level=0.0, restored=[], trace=None,
        timing_ms=TimingMs(queue=0, compute=0, total=0), model="m",
    )  # fmt: skip
    content = f"event: weather\r\ndata: {{}}\r\n\r\nevent: answer\r\ndata: {answer.model_dump_json()}\r\n\r\n"
    with Client("http://rdt", transport=httpx.MockTransport(lambda _: httpx.Response(200, text=content))) as client:
        stream = client.denoise_stream("a")
        assert next(stream) == answer
        stream.close()
