"""What the load generator promises: the texts it sends, when it sends them, and how it counts."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece

from benchmarks import load
from benchmarks.load import (
    Request,
    Sample,
    Unsuccessful,
    drive,
    percentile,
    poisson,
    rest_sender,
    saturate,
    summary,
    texts,
    whole_words,
)
from benchmarks.workloads import FIRST_WORD_ID, WORKLOADS, make_jobs
from rdt_core import Tokenizer
from tests.conftest import tiny_tokenizer_json

ASKED = Request("the [MASK] fox", max_steps=3, n_tokens=5, n_masked=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tiny one, with as many words as the workloads draw from."""
    tiny = WordPieceTokenizer.from_str(tiny_tokenizer_json())
    vocabulary = tiny.get_vocab()
    for letters in product(string.ascii_lowercase, repeat=2):
        for word in ("".join(letters), f"É{''.join(letters)}"):  # one of each two is not read as it is written
            vocabulary.setdefault(word, len(vocabulary))
    tiny.model = WordPiece(vocabulary, unk_token="[UNK]")
    larger = Tokenizer(tiny.to_str())
    assert larger.vocab_size > FIRST_WORD_ID
    return larger


@pytest.mark.parametrize("workload", WORKLOADS)
def test_texts_are_read_again_as_the_workload_drew_them(tokenizer: Tokenizer, workload: str) -> None:
    requests = texts(workload, 20, tokenizer, seed=3)
    jobs = make_jobs(workload, 20, tokenizer.vocab_size, seed=3)
    for request, job in zip(requests, jobs, strict=True):
        encoding = tokenizer.encode(request.text)
        assert encoding.masked == job.masked
        assert (request.n_tokens, request.n_masked) == (len(job.tokens), sum(job.masked))
        assert (request.max_steps, request.threshold) == (job.max_steps, job.threshold)
        assert tokenizer.unk_id not in encoding.ids


def test_words_are_whole_and_read_as_they_are_written(tokenizer: Tokenizer) -> None:
    words = whole_words(tokenizer)
    assert {"fox", "zz"} <= set(words)
    assert not [word for word in words if word.startswith(("##", "É")) or word in string.digits]


def test_the_body_asks_for_exactly_the_passes() -> None:
    assert ASKED.body() == {"text": "the [MASK] fox", "max_steps": 3, "threshold": 0.0, "halting": "gate"}


def test_poisson_arrivals_have_the_rate_asked_for() -> None:
    arrivals = poisson(50.0, 5000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert arrivals == sorted(arrivals)
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert arrivals == poisson(50.0, 5000, seed=1)


async def test_latency_counts_from_the_time_of_arrival() -> None:
    turn = asyncio.Lock()

    async def one_at_a_time(_request: Request) -> None:
        async with turn:
            await asyncio.sleep(0.01)

    samples = await drive(one_at_a_time, [ASKED] * 4, [0.0, 0.001, 0.002, 0.003])
    for place, sample in enumerate(samples, start=1):  # each has waited for all before it
        assert sample.ok
        assert sample.arrival + sample.latency >= place * 0.009


async def test_latency_does_not_count_the_time_before_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that says 100 until an answer comes, and each takes a second longer."""
    now = [100.0]
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    async def send(_request: Request) -> None:
        now[0] += 1.0

    samples = await drive(send, [ASKED] * 2, [0.0625, 0.125])
    assert [sample.latency for sample in samples] == [1.0 - 0.0625, 2.0 - 0.125]


async def test_nobody_waits_for_an_answer_to_be_sent() -> None:
    all_sent = asyncio.Barrier(4)

    async def send(_request: Request) -> None:
        await all_sent.wait()

    async with asyncio.timeout(5):
        samples = await drive(send, [ASKED] * 4, [0.0, 0.001, 0.002, 0.003])
    assert [sample.arrival for sample in samples] == [0.0, 0.001, 0.002, 0.003]


async def test_a_late_client_does_not_hide_its_lateness() -> None:
    async def blocks(_request: Request) -> None:
        import time  # noqa: PLC0415 - the one place that must not be asynchronous

        time.sleep(0.02)

    samples = await drive(blocks, [ASKED] * 3, [0.0, 0.0, 0.0])
    assert max(sample.latency for sample in samples) >= 0.06


async def test_errors_are_counted_and_programming_mistakes_are_not_swallowed() -> None:
    ends = iter([Unsuccessful("429"), None, ConnectionResetError(), Unsuccessful("429"), EOFError()])

    async def send(_request: Request) -> None:
        if (error := next(ends)) is not None:
            raise error

    samples = await drive(send, [ASKED] * 5, [0.0, 0.001, 0.002, 0.003, 0.004])
    assert [sample.status for sample in samples] == ["429", "ok", "ConnectionResetError", "429", "EOFError"]
    assert summary(samples, 1.0)["errors"] == {"429": 2, "ConnectionResetError": 1, "EOFError": 1}

    async def broken(_request: Request) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await drive(broken, [ASKED], [0.0])


async def test_saturate_keeps_that_many_on_their_way() -> None:
    now = most = n_sent = 0

    async def send(_request: Request) -> None:
        nonlocal now, most, n_sent
        now, n_sent = now + 1, n_sent + 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1

    rate = await saturate(send, [ASKED] * 20, concurrency=4)
    assert (most, n_sent) == (4, 20)
    assert 0 < rate <= 4 / 0.002


def test_summary_of_a_list_made_by_hand() -> None:
    answered = [Sample(float(i), i / 1000, ok=True, status="ok") for i in range(1, 101)]
    random.Random(0).shuffle(answered)
    figures = summary([*answered, Sample(100.0, 25.0, ok=False, status="429")], bound_seconds=0.02)
    assert (figures["p50_ms"], figures["p90_ms"], figures["p99_ms"]) == (50.0, 90.0, 99.0)
    assert figures["requests"] == 101
    assert figures["offered_per_second"] == 1.01
    assert figures["answered_per_second"] == 100 / 125  # until the last answer, a refusal too
    assert figures["goodput_per_second"] == 20 / 125
    assert figures["errors"] == {"429": 1}


def test_rates_while_requests_arrive_leave_out_what_is_answered_later() -> None:
    samples = [Sample(1.0, 0.5, True, "ok"), Sample(2.0, 2.0, True, "ok"), Sample(3.0, 9.0, True, "ok"),
               Sample(4.0, 0.0, False, "429")]  # fmt: skip
    figures = summary(samples, bound_seconds=1.0, while_arriving=True)
    assert figures["answered_per_second"] == 2 / 4
    assert figures["goodput_per_second"] == 1 / 4
    assert figures["p99_ms"] == 9000.0  # latencies are of all
    assert summary(samples, bound_seconds=1.0)["answered_per_second"] == 3 / 12


def test_nothing_answered_has_no_percentiles() -> None:
    figures = summary([Sample(1.0, 0.1, ok=False, status="503")], bound_seconds=1.0)
    assert figures["p99_ms"] is None
    assert figures["goodput_per_second"] == 0.0
    assert percentile([], 50) is None
    assert percentile([7.0], 1) == 7.0


@asynccontextmanager
async def answering(status: str, answer: object) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server with one answer for everything; the requests it has read, one connection a list item."""
    heard: list[bytes] = []

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(b"")
        content = json.dumps(answer).encode()
        while head := await reader.read(65_536):
            heard[-1] += head
            writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        writer.close()

    async with await asyncio.start_server(answer_all, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}", heard


async def test_rest_keeps_its_connection_and_checks_the_steps() -> None:
    async with answering("200 OK", {"steps": 3}) as (url, heard), rest_sender(url) as send:
        await send(ASKED)
        await send(ASKED)
        assert len(heard) == 1
        assert heard[0].count(b"POST /denoise HTTP/1.1\r\n") == 2
        assert json.dumps(ASKED.body()).encode() in heard[0]
    async with answering("200 OK", {"steps": 2}) as (url, _), rest_sender(url) as send:
        with pytest.raises(Unsuccessful, match="wrong steps"):
            await send(ASKED)
    async with answering("200 OK", {}) as (url, _), rest_sender(url, steps=None) as send:
        await send(ASKED)


async def test_rest_names_the_status_of_a_refusal() -> None:
    async with answering("429 Too Many Requests", {}) as (url, _), rest_sender(url) as send:
        samples = await drive(send, [ASKED], [0.0])
    assert samples[0].status == "429"
