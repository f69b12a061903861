"""How a caller's mistake is put into words."""

from __future__ import annotations

import base64
import math
from urllib.parse import quote

import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from service.errors import (
    MAX_SHOWN_CHARACTERS,
    MAX_SHOWN_PROBLEMS,
    DeadlineExceeded,
    FieldProblem,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unavailable,
    printable,
    shown,
)
from service.rpc.errors import status_of


def test_as_many_problems_as_are_shown_are_all_there_are() -> None:
    problem = FieldProblem.of("top_k", -1, "a whole number")
    for n, rest in ((1, ""), (MAX_SHOWN_PROBLEMS, ""), (MAX_SHOWN_PROBLEMS + 2, "; and 2 more")):
        error = InvalidArgument.of([problem] * n)
        assert error.message == "; ".join([problem.message] * min(n, MAX_SHOWN_PROBLEMS)) + rest
        assert len(error.problems) == min(n, MAX_SHOWN_PROBLEMS)


@pytest.mark.parametrize(
    ("value", "scalar", "in_a_sentence"),
    [
        (None, None, "null"),
        (True, True, "true"),
        (2**53 - 1, 2**53 - 1, "9007199254740991"),
        (-(2**53), "a whole number of 54 bits", "a whole number of 54 bits"),
        (0.5, 0.5, "0.5"),
        (math.nan, "NaN", "NaN"),
        (-math.inf, "-Infinity", "-Infinity"),
        ("3", "3", '"3"'),
        ("\ud800", "\\ud800", '"\\\\ud800"'),
        ([1], "an array", "an array"),
        ({}, "an object", "an object"),
    ],
)
def test_what_was_sent_is_told_as_json_would_have_it(value: object, scalar: object, in_a_sentence: str) -> None:
    assert printable(value) == scalar
    assert type(printable(value)) is type(scalar)
    assert shown(value) == in_a_sentence


def test_long_values_are_cut_where_they_become_long() -> None:
    assert printable("a" * MAX_SHOWN_CHARACTERS) == "a" * MAX_SHOWN_CHARACTERS
    assert printable("a" * (MAX_SHOWN_CHARACTERS + 1)) == "a" * MAX_SHOWN_CHARACTERS + "…"


@pytest.mark.parametrize(
    ("error", "kinds", "seconds"),
    [
        (ResourceExhausted("full", "queue_requests"), [ErrorInfo, RetryInfo], 1),
        (ResourceExhausted("short", "memory"), [ErrorInfo, RetryInfo], 60),
        (Unavailable("draining", "draining"), [ErrorInfo, RetryInfo], 1),
        (DeadlineExceeded("late"), [ErrorInfo], None),
        (InvalidArgument.of([FieldProblem.of("top_k", -1, "a whole number")]), [ErrorInfo, BadRequest], None),
    ],
)
def test_a_grpc_status_tells_programs_what_is_wrong_and_when_to_try_again(
    error: ServiceError, kinds: list[type[Message]], seconds: int | None
) -> None:
    packed = dict(status_of(error).trailing_metadata or ())["grpc-status-details-bin"]
    details = Status.FromString(packed).details
    assert [detail.Is(kind.DESCRIPTOR) for detail, kind in zip(details, kinds, strict=True)] == [True] * len(kinds)
    if seconds is not None:
        retry = RetryInfo()
        details[1].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() == seconds


@pytest.mark.parametrize("name", ["x", "x" * 79, "é" * 79, "𝄞" * 79])
def test_a_grpc_status_has_as_many_problems_as_proxies_take(name: str) -> None:
    """nginx reads 4 KiB of headers; for more it answers 502 and sends the server no calls for ten seconds."""
    error = InvalidArgument.of([FieldProblem.unknown(f"{index}{name}", 1, ["a", "b"]) for index in range(30)])
    status = status_of(error)
    packed = dict(status.trailing_metadata or ())["grpc-status-details-bin"]
    assert len(base64.b64encode(packed)) + len(quote(status.details, safe=" ")) < 3500
    told = Status.FromString(packed)
    assert told.message == status.details, "or clients refuse it"
    bad = BadRequest()
    told.details[1].Unpack(bad)
    messages = [violation.description for violation in bad.field_violations]
    assert 1 <= len(messages) <= MAX_SHOWN_PROBLEMS
    assert status.details.startswith("; ".join(messages) + "; and")
