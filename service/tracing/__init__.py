"""The interface for tracing requests. It knows no tracing library; `service.tracing.otel` implements it with one.

A transport opens a span for each call. The use case opens one below it for each item of a batch, and records the queue,
the passes and the decoding of a request on the innermost span. Texts are never recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from service.calls import Call
from service.engine.types import Job, Reading, Result

CONTEXT_HEADERS = ("traceparent", "tracestate")
"""Headers of W3C Trace Context, by which a caller says which trace a call belongs to."""


class Span(Protocol):
    """What a transport uses of a span."""

    def update_name(self, name: str) -> None: ...

    def set_attributes(self, attributes: Mapping[str, str | int]) -> None: ...


class Timeline(Protocol):
    """One request on its way through the engine."""

    def __call__(self, reading: Reading) -> None:
        """A pass has been made, just now."""

    def answered(self, job: Job, result: Result, model: str) -> None: ...


class Tracer(Protocol):
    def call(
        self, call: Call, name: str, attributes: Mapping[str, str], headers: Mapping[str, str]
    ) -> AbstractContextManager[Span]:
        """A span for a whole call, under the one that the context headers name; the call learns its trace id.

        Records at its end how the call has ended.
        """

    def item(self, index: int) -> AbstractContextManager[None]:
        """A span for an item of a batch, below that of the call. Records at its end how the item has ended."""

    def timeline(self) -> Timeline | None:
        """For a request that is about to be submitted; None if it is not traced."""

    def close(self) -> None:
        """Send what has not been sent yet, for a bounded time."""


class _NoSpan:
    def update_name(self, name: str) -> None:
        pass

    def set_attributes(self, attributes: Mapping[str, str | int]) -> None:
        pass


class NoTracer:
    """Traces nothing."""

    def call(self, *_: object) -> AbstractContextManager[Span]:
        return nullcontext(_NoSpan())

    def item(self, index: int) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's
        return nullcontext()

    def timeline(self) -> Timeline | None:
        return None

    def close(self) -> None:
        pass


NO_TRACER: Tracer = NoTracer()
