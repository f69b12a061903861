"""The messages between workers and the engine, and their form on the wire.

A message is an array: the number of its kind, then its fields in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

from service.engine.types import Choice, Job, Reading, Result
from service.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    RefusalReason,
    Refused,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from service.lifecycle import State

Row = Sequence[Any]
Samples = dict[str, float]
"""Values of counters, by the name and labels that a scrape shows."""

ERRORS = {error.code: error for error in (DeadlineExceeded, FailedPrecondition, Internal)}
JOB = tuple(field.name for field in fields(Job) if field.name != "deadline")
RESULT = tuple(field.name for field in fields(Result))
REFUSALS = {error.code: error for error in (ResourceExhausted, Unavailable)}


class Message:
    """Fields are sent as they are, unless a class overrides `row` and `of`."""

    KIND: ClassVar[int]

    def row(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]

    @classmethod
    def of(cls, row: Row) -> Self:
        return cls(*row)


@dataclass(frozen=True)
class Hello(Message):
    KIND: ClassVar[int] = 1
    worker: str
    engine: str  # the engine whose base this is; empty for none
    base: Samples


@dataclass(frozen=True)
class Submit(Message):
    KIND: ClassVar[int] = 2
    id: int
    digest: str  # of the model whose tokenizer made the tokens
    job: Job  # without its deadline, which is on the sender's clock
    seconds_left: float | None
    watched: bool  # whether to send a `Pass` after every pass

    def row(self) -> list[Any]:
        job = [getattr(self.job, name) for name in JOB]
        return [self.id, self.digest, self.seconds_left, self.watched, *job]

    @classmethod
    def of(cls, row: Row) -> Self:
        id_, digest, seconds_left, watched, *job = row
        return cls(id_, digest, Job(**dict(zip(JOB, job, strict=True))), seconds_left, watched)


@dataclass(frozen=True)
class Cancel(Message):
    KIND: ClassVar[int] = 3
    id: int


@dataclass(frozen=True)
class Adopted(Message):
    KIND: ClassVar[int] = 4
    digest: str


@dataclass(frozen=True)
class Reload(Message):
    KIND: ClassVar[int] = 5
    id: int


@dataclass(frozen=True)
class Scrape(Message):
    KIND: ClassVar[int] = 6
    id: int


@dataclass(frozen=True)
class Report(Message):
    KIND: ClassVar[int] = 7
    asked: int  # of the `ReportWanted` it answers; 0 for none
    counters: Samples
    gauges: Samples  # of the process


@dataclass(frozen=True)
class Leave(Message):
    """The connection will end because its worker was asked to end."""

    KIND: ClassVar[int] = 8


@dataclass(frozen=True)
class Serving(Message):
    KIND: ClassVar[int] = 16
    tokenizer: str  # JSON
    card: dict[str, Any]
    limits: dict[str, int]

    @property
    def digest(self) -> str:
        return str(self.card["digest"])


@dataclass(frozen=True)
class Status(Message):
    KIND: ClassVar[int] = 17
    state: State
    waiting: int
    waiting_tokens: int

    @classmethod
    def of(cls, row: Row) -> Self:
        if row[0] not in get_args(State):
            raise ValueError(f"state is {row[0]!r}")
        return cls(*row)


@dataclass(frozen=True)
class Base(Message):
    KIND: ClassVar[int] = 18
    engine: str
    counters: Samples


@dataclass(frozen=True)
class Pass(Message):
    KIND: ClassVar[int] = 19
    id: int
    reading: Reading

    def row(self) -> list[Any]:
        reading = self.reading
        return [self.id, reading.level, reading.reason, reading.chosen, reading.guesses]

    @classmethod
    def of(cls, row: Row) -> Self:
        id_, level, reason, chosen, guesses = row
        return cls(id_, Reading(level, reason, [*map(_choice, chosen)], [*map(_choice, guesses)]))


@dataclass(frozen=True)
class Answered(Message):
    KIND: ClassVar[int] = 20
    id: int
    result: Result

    def row(self) -> list[Any]:
        return [self.id, *(getattr(self.result, name) for name in RESULT)]

    @classmethod
    def of(cls, row: Row) -> Self:
        values = dict(zip(RESULT, row[1:], strict=True))
        values["candidates"] = [[*map(_pair, some)] if some else [] for some in values["candidates"]]
        return cls(row[0], Result(**values))


@dataclass(frozen=True)
class Failed(Message):
    """The job, reload or scrape of this id has failed."""

    KIND: ClassVar[int] = 21
    id: int
    error: ServiceError

    def row(self) -> list[Any]:
        error = self.error
        return [self.id, error.code, error.message, error.reason if isinstance(error, Refused) else None]

    @classmethod
    def of(cls, row: Row) -> Self:
        id_, code, message, reason = row
        if code in REFUSALS and reason in get_args(RefusalReason):
            return cls(id_, REFUSALS[code](message, reason))
        return cls(id_, ERRORS[code](message) if code in ERRORS else Internal(message))


@dataclass(frozen=True)
class Reloaded(Message):
    KIND: ClassVar[int] = 22
    id: int
    outcome: Literal["swapped", "unchanged"]
    previous: str
    model: str


@dataclass(frozen=True)
class Scraped(Message):
    KIND: ClassVar[int] = 23
    id: int
    exposition: bytes


@dataclass(frozen=True)
class ReportWanted(Message):
    KIND: ClassVar[int] = 24
    asked: int


KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        Hello, Submit, Cancel, Adopted, Reload, Scrape, Report, Leave,
        Serving, Status, Base, Pass, Answered, Failed, Reloaded, Scraped, ReportWanted,
    )
}  # fmt: skip


def write(message: Message) -> list[Any]:
    return [message.KIND, *message.row()]


def read(array: object) -> Message:
    """Raises `ValueError` or `TypeError` for what is no message."""
    if not isinstance(array, list) or not array or array[0] not in KINDS:
        raise ValueError("not a message")
    return KINDS[array[0]].of(array[1:])


def _choice(row: Row) -> Choice:
    at, token, probability, candidates = row
    return Choice(at, token, probability, [*map(_pair, candidates)])


def _pair(row: Row) -> tuple[int, float]:
    token, probability = row
    return token, probability
