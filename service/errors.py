"""Every way a request can fail, in neutral words; each transport maps the codes once.

    ServiceError
    ├── InvalidArgument       invalid_argument      a field has a value that is not allowed
    │   ├── Malformed         malformed             the request cannot be read at all
    │   └── UnsupportedFormat unsupported_format    the request is in a format nobody reads here
    ├── NotFound              not_found             no model of that name is served
    ├── TooLarge              too_large             more text, or more bytes, than the server takes
    ├── Unauthenticated       unauthenticated       no key, or a wrong one
    ├── Refused
    │   ├── ResourceExhausted resource_exhausted    the queue is full, or memory short: try again later
    │   └── Unavailable       unavailable           loading, draining or failed
    ├── FailedPrecondition    failed_precondition   a reload that cannot be made
    ├── DeadlineExceeded      deadline_exceeded     the deadline passed before there was an answer
    ├── Cancelled             cancelled             the caller left
    └── Internal              internal              our fault

An error carries a message for people and, where fields are to blame, one `FieldProblem` for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

Code = Literal[
    "invalid_argument",
    "malformed",
    "unsupported_format",
    "not_found",
    "too_large",
    "unauthenticated",
    "resource_exhausted",
    "unavailable",
    "failed_precondition",
    "deadline_exceeded",
    "cancelled",
    "internal",
]
CODES: tuple[Code, ...] = get_args(Code)
RefusalReason = Literal["queue_requests", "queue_tokens", "bodies", "memory", "loading", "draining", "failed"]

Printable = str | int | float | bool | None

RETRY_SECONDS = 1
"""After how long a refused caller is told to try again."""
MEMORY_RETRY_SECONDS = 60
"""The same where memory was short: budgets do not grow again sooner."""

DRAINING = "the server is shutting down and takes no new work"

MAX_SHOWN_CHARACTERS = 80
MAX_SHOWN_PROBLEMS = 20


class ServiceError(Exception):
    """Base of the hierarchy. `message` is safe to show to the caller."""

    code: ClassVar[Code]

    def __init__(self, message: str, problems: Sequence[FieldProblem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)

    def at(self, path: str) -> Self:
        """The same error in a part of a larger request: `max_steps` becomes `items[3].max_steps`."""
        if not self.problems:
            return self
        problems = [replace(problem, field=f"{path}.{problem.field}") for problem in self.problems]
        return type(self)(f"{path}: {self.message}", problems)


class InvalidArgument(ServiceError):
    code: ClassVar[Code] = "invalid_argument"

    @classmethod
    def of(cls, problems: Sequence[FieldProblem]) -> InvalidArgument:
        """One error for all bad fields; a request with very many of them is answered with the first."""
        first = problems[:MAX_SHOWN_PROBLEMS]
        message = "; ".join(problem.message for problem in first)
        if len(problems) > len(first):
            message += f"; and {len(problems) - len(first)} more"
        return cls(message, first)


class Malformed(InvalidArgument):
    code: ClassVar[Code] = "malformed"


class UnsupportedFormat(InvalidArgument):
    code: ClassVar[Code] = "unsupported_format"


class NotFound(ServiceError):
    code: ClassVar[Code] = "not_found"


class TooLarge(ServiceError):
    code: ClassVar[Code] = "too_large"


class Unauthenticated(ServiceError):
    code: ClassVar[Code] = "unauthenticated"


class Refused(ServiceError):
    """Nothing is wrong with the request; the server cannot take it now."""

    def __init__(self, message: str, reason: RefusalReason) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def retry_seconds(self) -> int:
        """When to try again."""
        return MEMORY_RETRY_SECONDS if self.reason == "memory" else RETRY_SECONDS


class ResourceExhausted(Refused):
    code: ClassVar[Code] = "resource_exhausted"


class Unavailable(Refused):
    code: ClassVar[Code] = "unavailable"

    @classmethod
    def draining(cls) -> Unavailable:
        """For requests that come while the server drains."""
        return cls(DRAINING, "draining")

    @classmethod
    def shut_down(cls) -> Unavailable:
        """For requests that were not finished in the grace period."""
        return cls("the server shut down before this request was finished", "draining")

    @classmethod
    def restarting(cls) -> Unavailable:
        return cls("the engine has failed and is restarting", "failed")


class FailedPrecondition(ServiceError):
    code: ClassVar[Code] = "failed_precondition"


class DeadlineExceeded(ServiceError):
    code: ClassVar[Code] = "deadline_exceeded"


class Cancelled(ServiceError):
    code: ClassVar[Code] = "cancelled"


class Internal(ServiceError):
    code: ClassVar[Code] = "internal"

    def __init__(self, message: str = "the server has logged what went wrong") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field. `value` is what was sent, safe to print."""

    field: str
    message: str
    value: Printable

    @classmethod
    def of(cls, field: str, value: object, wanted: str) -> FieldProblem:
        """`max_steps is 0: want a whole number from 1 to 100`."""
        name = _short(field)
        return cls(name, f"{name} is {shown(value)}: want {wanted}", printable(value))

    @classmethod
    def unknown(cls, field: str, value: object, known: Iterable[str]) -> FieldProblem:
        name = _short(field)
        return cls(name, f"{name} is not a field: want one of {', '.join(known)}", printable(value))

    @classmethod
    def missing(cls, field: str, wanted: str) -> FieldProblem:
        return cls(field, f"{field} is missing: want {wanted}", None)

    def under(self, path: str) -> FieldProblem:
        """The same problem, of a field inside the field `path`."""
        return replace(self, field=f"{path}.{self.field}", message=f"{path}.{self.message}") if path else self


def printable(value: object) -> Printable:
    """A caller's value as a short JSON scalar: never NaN, a lone surrogate, or a thousand digits."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else json.dumps(value)  # the word for it
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def shown(value: object) -> str:
    """A caller's value inside a sentence: `"3"`, `null`, `NaN`, `an array`."""
    short = printable(value)
    return short if isinstance(short, str) and not isinstance(value, str) else json.dumps(short, ensure_ascii=False)


def _short(text: str) -> str:
    shown = text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")
