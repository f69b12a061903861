"""Who waits for which job. A caller is shown the passes of its job, and gets its end exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from service.engine.protocol import OnReading, show
from service.engine.types import Reading, Result, Ticket
from service.errors import ServiceError


class Callers:
    """Everybody that waits, by ticket. A ticket that nobody waits for any more is ignored."""

    def __init__(self) -> None:
        self._waiting: dict[Ticket, _Caller] = {}

    def join(self, ticket: Ticket, on_reading: OnReading | None) -> asyncio.Future[Result]:
        """A future of the answer. Whoever stops waiting before it is there must `leave`."""
        caller = self._waiting[ticket] = _Caller(on_reading)
        return caller.answer

    def leave(self, ticket: Ticket) -> bool:
        """Stop waiting; whether the job had not ended yet."""
        return self._waiting.pop(ticket, None) is not None

    def show(self, ticket: Ticket, reading: Reading, step: int) -> None:
        if (caller := self._waiting.get(ticket)) is not None:
            caller.show(reading, step)

    def answer(self, ticket: Ticket, result: Result) -> None:
        caller = self._waiting.pop(ticket, None)
        if caller is not None and not caller.answer.done():
            caller.answer.set_result(result)

    def fail(self, tickets: Iterable[Ticket], make_error: Callable[[], ServiceError]) -> None:
        for ticket in tickets:
            if (caller := self._waiting.pop(ticket, None)) is not None:
                caller.fail(make_error())


class _Caller:
    def __init__(self, on_reading: OnReading | None) -> None:
        self.answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._on_reading = on_reading
        self._shown = 0  # passes shown so far

    def show(self, reading: Reading, step: int) -> None:
        """Show a pass, unless it was shown before the job had to begin anew."""
        if self._on_reading is None or step <= self._shown:
            return
        self._shown = step
        if (error := show(reading, self._on_reading)) is not None:
            self.fail(error)

    def fail(self, error: ServiceError) -> None:
        if not self.answer.done():  # a caller who left has cancelled it
            self.answer.set_exception(error)
