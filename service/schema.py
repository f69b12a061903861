"""Requests and answers, validated once for every transport.

`read_request` is the entry point: it names every bad field, its value and what was wanted. Types are
strict: `"3"`, `true` and `1.5` are not whole numbers. Bounds that depend on the running model come in
as `Limits`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.engine.types import Halting, HaltReason
from service.errors import MAX_SHOWN_PROBLEMS, FieldProblem, InvalidArgument, shown
from service.limits import Limits

MAX_SEED = 2**63 - 1


class DenoiseRequest(BaseModel):
    """One text to restore, and how. `max_steps`, `threshold` and `halting` default to the checkpoint's.

    `GET /model` has the largest values that are taken. Whole numbers are written without a point: `2`, not `2.0`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str = Field(min_length=1, description="Text with `[MASK]` (in any letter case) where tokens are missing.")
    max_steps: int | None = Field(default=None, ge=1, description="Largest number of passes.")
    threshold: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="`gate`: halt when the level falls below this; 0 never halts early. `settle`: write a token "
        "back once it is less likely than this to be wrong, and all that are left once the level falls below it.",
    )
    halting: Halting | None = Field(
        default=None,
        description="`gate`: decode once at the end. `settle`: tokens come back gradually, the surest first, and "
        "neighbours in different passes where there are enough.",
    )
    restore: Literal["masked", "all"] | None = Field(
        default="masked",
        description="`masked` fills the masks only; `all` returns the model's reading of every token.",
    )
    top_k: int | None = Field(
        default=0,
        ge=0,
        description="How many candidates to list for each restored token, the chosen one first.",
    )
    trace: bool | None = Field(default=False, description="List the level after every pass.")
    timeout_ms: int | None = Field(
        default=None,
        ge=1,
        description="Answer within this time with the best so far, though not before the first pass has ended; 504 if "
        "the request is still in the queue by then.",
    )
    mask_ratio: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="Let the server mask this share of the tokens first."
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Which tokens `mask_ratio` picks: same seed, same tokens."
    )

    @field_validator("text", mode="before")  # before pydantic, whose message would not say what is wanted
    @classmethod
    def _is_plain_text(cls, text: object) -> object:
        if not isinstance(text, str):
            return text
        if "\0" in text:
            raise ValueError("text without NUL characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("text without lone surrogates") from None
        return text


# An answer holds dozens of the next three. They are plain dataclasses, because pydantic would check each one, and not
# frozen, because a frozen one takes four times as long to make.


@dataclass(slots=True)
class Candidate:
    """A reading the model considered for one place."""

    text: str
    probability: float


@dataclass(slots=True)
class Restored:
    """Characters `start:end` of the answer's text, counted in Unicode code points, written after pass `step`."""

    start: int
    end: int
    text: str
    probability: float
    step: int
    candidates: list[Candidate]


@dataclass(slots=True)
class TracePoint:
    """The level after one pass."""

    step: int
    level: float


class TimingMs(BaseModel):
    """Milliseconds waited, computed, and from arrival to answer."""

    queue: float
    compute: float
    total: float


class DenoiseAnswer(BaseModel):
    """The restored text, and how it came about."""

    text: str
    corrupted_text: str | None = Field(default=None, description="The text as masked by the server, with `mask_ratio`.")
    steps: int = Field(description="Passes made.")
    max_steps: int = Field(description="Passes at the most: as asked for, or fewer if the server sheds load.")
    halt_reason: HaltReason = Field(
        description="`gate`: the level fell below the threshold, or everything had settled; `max_steps`: all passes "
        "there were to be; `deadline`: the deadline passed."
    )
    level: float = Field(
        description="What is left, 0 nothing and 1 everything: with `gate` what the gate said last, with `settle` the "
        "share of masked tokens that were still open, each weighted by how likely it is wrong."
    )
    restored: list[Restored] = Field(description="Every token that was written, in order.")
    trace: list[TracePoint] | None = Field(description="The level after every pass, if asked for.")
    timing_ms: TimingMs
    model: str = Field(description="Name of the model and the first 12 digits of its checkpoint's SHA-256.")


class DenoisePass(BaseModel):
    """A restoration under way, after one pass."""

    step: int = Field(description="Passes made so far.")
    level: float = Field(description="What is left, as in the answer.")
    text: str = Field(
        description="What would be the answer's text if this pass were the last. With `restore: all`, visible tokens "
        "are as they were sent: they are read again at the end."
    )


class ModelCard(BaseModel):
    """Which model is served, where it runs, and what it accepts."""

    name: str
    digest: str = Field(description="SHA-256 of the checkpoint.")
    device: str
    precision: str
    n_parameters: int
    configuration: dict[str, object]
    limits: dict[str, int]

    @property
    def version(self) -> str:
        """The first digits of the digest."""
        return self.digest[:12]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


BatchItem = DenoiseRequest | InvalidArgument
"""An item of a batch: a request, or what is wrong with it. Items fail one by one."""

ITEMS = "items"
OPTIONS = tuple(name for name in DenoiseRequest.model_fields if name != "text")
"""What the items of a batch may share."""


def read_request(fields: object, limits: Limits) -> DenoiseRequest:
    """Plain values, as decoded from JSON -> a request. Raises `InvalidArgument` naming every bad field."""
    if not isinstance(fields, Mapping):
        raise InvalidArgument(f"the request is {shown(fields)}: want an object with the field text")
    return _validated(fields, limits)


def read_batch(fields: object, limits: Limits, options_at: str = "", items_at: str = ITEMS) -> list[BatchItem]:
    """`{"items": [...], ...}` -> requests; the fields beside `items` are options of every item that does not give its
    own, and null is one of its own. `options_at` is where these options stand for the caller, if not beside `items`;
    `items_at` is where the items stand.

    Raises `InvalidArgument` for what is wrong with the whole; what is wrong with an item stands in its place.
    """
    if not isinstance(fields, Mapping):
        raise InvalidArgument(f"the request is {shown(fields)}: want an object with the field items")
    shared = {name: fields[name] for name in OPTIONS if name in fields}
    problems = unknown_fields(fields, ("items", *OPTIONS))
    problems += _list_problems(fields, limits)
    problems += [problem.under(options_at) for problem in _problems({"text": "-", **shared}, limits)]
    if problems:
        raise InvalidArgument.of(problems)
    return [_read_item(item, shared, f"{items_at}[{index}]", limits) for index, item in enumerate(fields["items"])]


def _read_item(item: object, shared: Mapping[str, object], path: str, limits: Limits) -> BatchItem:
    if not isinstance(item, Mapping):
        return InvalidArgument.of([FieldProblem.of(path, item, "an object with the field text")])
    try:
        return _validated({**shared, **item}, limits)
    except InvalidArgument as error:
        return error.at(path)


def _list_problems(fields: Mapping[str, object], limits: Limits) -> list[FieldProblem]:
    """Problems of `items` as a list."""
    wanted = f"an array of 1 to {limits.max_batch_items} objects with the field text"
    if "items" not in fields:
        return [FieldProblem.missing("items", wanted)]
    items = fields["items"]
    if not isinstance(items, list):
        return [FieldProblem.of("items", items, wanted)]
    if not 1 <= len(items) <= limits.max_batch_items:
        return [FieldProblem("items", f"items is an array of {len(items)}: want {wanted}", len(items))]
    return []


def _validated(fields: Mapping[str, object], limits: Limits) -> DenoiseRequest:
    with suppress(ValidationError):
        request = DenoiseRequest.model_validate(fields)
        if not limits.above(fields, _wanted(limits)):
            return request
    raise InvalidArgument.of(_problems(fields, limits))


def _problems(fields: Mapping[str, object], limits: Limits) -> list[FieldProblem]:
    """Everything that is wrong with the fields of a request."""
    known = {name: fields[name] for name in DenoiseRequest.model_fields if name in fields}
    wanted = _wanted(limits)
    problems = unknown_fields(fields, DenoiseRequest.model_fields)
    problems += limits.above(known, wanted)
    try:
        DenoiseRequest.model_validate(known)
    except ValidationError as error:
        problems += _schema_problems(error, known, wanted)
    return problems


def unknown_fields(fields: Mapping[str, object], known: Collection[str]) -> list[FieldProblem]:
    """One problem for each unknown field. Of very many, only those that will be shown are written out."""
    unknown = [name for name in fields if name not in known]
    shown = [FieldProblem.unknown(str(name), fields[name], known) for name in unknown[:MAX_SHOWN_PROBLEMS]]
    return shown + shown[-1:] * (len(unknown) - len(shown))


@cache
def _wanted(limits: Limits) -> dict[str, str]:
    return {
        "text": "a string of at least one character",
        "max_steps": f"a whole number from 1 to {limits.max_steps}",
        "threshold": "a finite number >= 0",
        "halting": "gate or settle",
        "restore": "masked or all",
        "top_k": f"a whole number from 0 to {limits.max_top_k}",
        "trace": "true or false",
        "timeout_ms": f"a whole number from 1 to {limits.max_timeout_ms}",
        "mask_ratio": "a number from 0 to 1",
        "seed": f"a whole number from 0 to {MAX_SEED}",
    }


def _schema_problems(
    error: ValidationError, fields: Mapping[str, object], wanted: Mapping[str, str]
) -> list[FieldProblem]:
    problems = []
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0])
        if fault["type"] == "missing":
            problems.append(FieldProblem.missing(name, wanted[name]))
        elif fault["type"] == "value_error":  # raised by a validator of ours, whose message is what was wanted
            problems.append(FieldProblem.of(name, fields[name], str(fault["ctx"]["error"])))
        else:
            problems.append(FieldProblem.of(name, fields[name], wanted[name]))
    return problems
