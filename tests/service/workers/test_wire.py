"""Messages there and back, and what becomes of a connection that is not what it should be."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from unittest import mock

import msgpack
import pytest

from service.engine.types import Choice, Job, Reading, Result
from service.errors import DeadlineExceeded, FailedPrecondition, Internal, RefusalReason, ResourceExhausted, Unavailable
from service.workers import messages, remote, wire
from service.workers.messages import Message
from service.workers.wire import Wire
from tests.service.workers.fleet import until

JOB = Job([2, 7, 3], [False, True, False], 20, 0.1, "settle", top_k=2, decode_all=True, stream=True)
RESULT = Result(
    [2, 9, 3], [1], [1 / 3], [4], [[(9, 1 / 3), (8, 0.1)]], 4, [0.5, 0.1 + 0.2], "gate", 20, 0.25, 1e-9, 0.125
)
READING = Reading(0.1 + 0.2, None, [Choice(1, 9, 1 / 3, [(9, 1 / 3)])], [Choice(2, 8, 0.5, [])])
SAMPLES = {"rdt_passes_total": 3.0, "rdt_refused_total\nreason=loading": float("inf")}
MESSAGES: list[Message] = [
    messages.Hello("0.1", "an engine", SAMPLES),
    messages.Submit(2**40, "a" * 64, JOB, 1.5, watched=True),
    messages.Submit(1, "a" * 64, JOB, None, watched=False),
    messages.Cancel(3),
    messages.Adopted("b" * 64),
    messages.Reload(4),
    messages.Scrape(5),
    messages.Report(6, SAMPLES, {}),
    messages.Leave(),
    messages.Serving("{}", {"digest": "c", "configuration": {"suppress_tokens": [1]}}, {"max_seq_len": 32}),
    messages.Status("ready", 1, 2),
    messages.Base("an engine", SAMPLES),
    messages.Pass(7, READING),
    messages.Answered(8, RESULT),
    messages.Reloaded(9, "swapped", "old@1", "new@2"),
    messages.Scraped(10, b"# HELP \xc3\xa9\n"),
    messages.ReportWanted(11),
]
ERRORS = [
    DeadlineExceeded("late"),
    FailedPrecondition("no"),
    Internal("ours"),
    *(kind("é", reason) for kind in (ResourceExhausted, Unavailable) for reason in get_args(RefusalReason)),
]


def there_and_back(message: Message) -> Message:
    return messages.read(msgpack.unpackb(msgpack.packb(messages.write(message))))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    assert there_and_back(message) == message
    assert type(there_and_back(message)) is type(message)


def test_every_kind_is_tried() -> None:
    assert {type(message) for message in MESSAGES} | {messages.Failed} == set(messages.KINDS.values())
    same = [field.name for field in dataclasses.fields(Job) if getattr(JOB, field.name) == field.default]
    assert same == ["deadline"], "what is left at its default could get lost unnoticed"


@pytest.mark.parametrize(
    ("code", "reason"), [("of_a_newer_engine", None), ("resource_exhausted", "of_a_newer_engine"), ("odd", "memory")]
)
def test_an_error_that_nobody_here_knows_is_an_internal_one(code: str, reason: str | None) -> None:
    failed = messages.read([messages.Failed.KIND, 12, code, "words", reason])
    assert isinstance(failed, messages.Failed)
    assert type(failed.error) is Internal
    assert failed.error.message == "words"


def test_nothing_is_sent_without_a_connection_or_after_its_end() -> None:
    one = Wire(lambda *_: None, lambda _: None)
    one.send(messages.Leave())
    transport = mock.Mock()
    transport.is_closing.return_value = True
    one.connection_made(transport)
    one.send(messages.Leave())
    transport.write.assert_not_called()


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_keeps_its_kind_and_its_words(error: Unavailable) -> None:
    back = there_and_back(messages.Failed(12, error))
    assert isinstance(back, messages.Failed)
    assert (type(back.error), back.error.message) == (type(error), error.message)
    assert getattr(back.error, "reason", None) == getattr(error, "reason", None)


@pytest.mark.parametrize("array", [[], [0], [99, 1], {"a": 1}, 7, [3], [3, 1, 2], [17, "asleep", 0, 0, 0], [2, 1]])
def test_what_is_no_message_is_refused(array: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        messages.read(array)


class End:
    """One end of a connection, and what came out of it."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.n_ends = 0
        self.wire = Wire(lambda _, message: self.heard.append(message), lambda _: self._ended())

    def _ended(self) -> None:
        self.n_ends += 1


async def ends(path: Path) -> tuple[End, End]:
    near, far = End(), End()
    loop = asyncio.get_running_loop()
    listener = await loop.create_unix_server(lambda: far.wire, str(path))
    await loop.create_unix_connection(lambda: near.wire, str(path))
    await until(lambda: far.wire.open)
    listener.close()
    return near, far


async def test_messages_arrive_in_order_and_the_end_after_them(tmp_path: Path) -> None:
    near, far = await ends(tmp_path / "s")
    big = messages.Serving("t" * 3_000_000, {"digest": "c"}, {})
    sent = [*MESSAGES, big, messages.Cancel(1)]
    for message in sent:
        near.wire.send(message)
    near.wire.close()
    await until(lambda: far.n_ends)
    assert far.heard == sent
    assert (near.n_ends, far.n_ends) == (1, 1)
    far.wire.send(messages.Cancel(1))
    assert not far.wire.open


@pytest.mark.parametrize("rubbish", [b"\xc1", b"\x93\x01", msgpack.packb([99]), b"GET / HTTP/1.1\r\n\r\n"])
async def test_rubbish_ends_the_connection(tmp_path: Path, rubbish: bytes, caplog: pytest.LogCaptureFixture) -> None:
    near, far = await ends(tmp_path / "s")
    assert near.wire._transport is not None
    near.wire._transport.write(rubbish)
    if rubbish == b"\x93\x01":  # only the beginning of something
        near.wire.close()
    await until(lambda: far.n_ends)
    assert far.heard == []
    assert ("cannot be read" in caplog.text) == (rubbish != b"\x93\x01")


async def test_a_message_that_is_too_large_ends_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1000)
    near, far = await ends(tmp_path / "s")
    near.wire.send(messages.Scraped(1, b"x" * 2000))
    await until(lambda: far.n_ends)
    assert far.heard == []


async def test_an_end_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 1_000_000)
    near, far = await ends(tmp_path / "s")
    assert far.wire._transport is not None
    far.wire._transport.pause_reading()
    for _ in range(100):
        near.wire.send(messages.Scraped(1, b"x" * 100_000))
    assert not near.wire.open
    await until(lambda: near.n_ends)  # whatever the other end does
    far.wire.abort()
    await until(lambda: far.n_ends)


class Overheard(remote.Link):
    """Which looks find that the engine has spoken is written down beforehand."""

    looks: Iterator[bool]

    @property
    def _spoken(self) -> bool:
        spoken = next(self.looks, None)
        if spoken is None:  # the end
            self._lost.set()
        return spoken is not False

    @_spoken.setter
    def _spoken(self, _: bool) -> None:
        pass


@pytest.mark.parametrize(("looks", "n_aborts"), [("..x..x..", 0), ("...", 1), ("x...", 1)])
async def test_silence_is_counted_from_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: str, n_aborts: int
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.0)
    assert remote.SILENT_POLLS == 3
    link = Overheard(tmp_path / "engine", "0.0", lambda *_: None)
    link.looks = iter([look == "x" for look in looks])
    connection = mock.Mock(spec=Wire)
    await asyncio.wait_for(link._watch(connection), timeout=5)
    assert connection.abort.call_count == n_aborts


async def test_no_pass_is_shown_after_the_end() -> None:
    """As when the observer has failed, and the next pass came with the one before."""
    shown: list[Reading] = []
    asked = remote.Asked(shown.append)
    asked.end(Unavailable.draining())
    asked.show(READING)
    assert shown == []
    with pytest.raises(Unavailable):
        await asked.answer


async def asking(tmp_path: Path) -> tuple[remote.Link, mock.Mock, asyncio.Task[messages.Scraped]]:
    """A link to an engine that never answers, and a question to it."""
    link, connection = remote.Link(tmp_path / "engine", "0.0", lambda *_: None), mock.Mock(spec=Wire)
    link.wire = connection
    question = asyncio.create_task(link.ask(messages.Scrape, messages.Scraped))
    await asyncio.sleep(0)
    return link, connection, question


@pytest.mark.parametrize("end", ["the caller leaves", "the engine is lost"])
async def test_a_drain_is_over_with_the_last_question(tmp_path: Path, end: str) -> None:
    link, connection, question = await asking(tmp_path)
    draining = asyncio.create_task(link.drain(60))
    await asyncio.sleep(0)
    if end == "the caller leaves":
        question.cancel()
    else:
        link._ended(connection)
    await asyncio.wait_for(draining, 5)
    with pytest.raises((asyncio.CancelledError, Unavailable)):
        await question


@pytest.mark.parametrize(
    ("n_asked", "draining", "levels"), [(1, False, [logging.ERROR]), (0, False, [logging.WARNING]), (0, True, [])]
)
async def test_the_end_of_a_connection_is_as_bad_as_what_is_lost_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, n_asked: int, draining: bool, levels: list[int]
) -> None:
    link, connection = remote.Link(tmp_path / "engine", "0.0", lambda *_: None), mock.Mock(spec=Wire)
    link.draining = draining
    link._asked = {number: remote.Asked(None) for number in range(n_asked)}
    lost = [asked.answer for asked in link._asked.values()]
    link._ended(connection)
    assert [record.levelno for record in caplog.records] == levels
    assert all(isinstance(answer.exception(), Unavailable) for answer in lost)


async def test_what_is_left_after_the_grace_period_is_cancelled_once(tmp_path: Path) -> None:
    link, connection, question = await asking(tmp_path)
    await link.drain(0)
    with pytest.raises(Unavailable, match="shut down before"):
        await question
    assert connection.send.mock_calls == [mock.call(messages.Scrape(1)), mock.call(messages.Cancel(1))]
