"""The use case: one request in, one answer out. Transports only translate to it and from it.

read            plain values -> a valid request
denoise         a place in the queue -> tokens -> the engine -> text
denoise_batch   many at once, each of which succeeds or fails by itself
denoise_stream  one, with the text after every pass
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

from rdt_core import Encoding, ModelConfig, Tokenizer
from rdt_core.tokenizer import LONG_TEXT
from service.calls import milliseconds
from service.engine.protocol import Engine
from service.engine.queue import Place
from service.engine.types import Job, Reading, Result
from service.errors import DeadlineExceeded, Internal, ServiceError
from service.limits import Limits
from service.metrics import Metrics, Transport
from service.pump import pumped
from service.schema import (
    ITEMS,
    BatchItem,
    DenoiseAnswer,
    DenoisePass,
    DenoiseRequest,
    ModelCard,
    TimingMs,
    TracePoint,
    read_batch,
    read_request,
)
from service.text import Draft, check_characters, encode, hide, write_back
from service.tracing import NO_TRACER, Timeline, Tracer

log = logging.getLogger(__name__)

POLL_SECONDS = 0.002
"""How often it is checked whether batches and long texts have reached the engine."""
TURNS = 16
"""Turns of the event loop to wait, with some to spare: from taking a denoiser to submitting to its engine are two or
three."""


class Denoiser:
    """Serves one model. `card` describes it; `config` holds the defaults of its requests."""

    def __init__(
        self,
        *,
        card: ModelCard,
        config: ModelConfig,
        tokenizer: Tokenizer,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.engine = engine
        self.limits = limits
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._tracer = tracer
        self._beginning = asyncio.Lock()  # batches begin one item a turn: more would hold up everybody else
        self._preparing = 0  # batches and long texts that have not reached the engine yet

    def read(self, fields: object) -> DenoiseRequest:
        """Raises `InvalidArgument` naming every bad field."""
        return read_request(fields, self.limits)

    def read_batch(self, fields: object, options_at: str = "", items_at: str = ITEMS) -> list[BatchItem]:
        """Raises `InvalidArgument` for what is wrong with the batch as a whole; a bad item is returned as its error."""
        return read_batch(fields, self.limits, options_at, items_at)

    async def denoise(
        self,
        request: DenoiseRequest,
        transport: Transport,
        seconds_left: float | None = None,
        cut_at: float | None = None,
    ) -> DenoiseAnswer:
        """After `seconds_left`, the caller's own deadline if the transport knows of one, the answer is the best so far.
        At `cut_at`, on the event loop's clock, there is none: `DeadlineExceeded`.

        Raises `TooLarge`, `InvalidArgument`, `DeadlineExceeded`, and what `Engine.reserve` and `Engine.submit` raise.
        """
        with self._metrics.request(transport), self.engine.reserve() as place:
            async with cut(cut_at):
                work = await self._prepare(request, seconds_left)
                result = await self.engine.submit(work.job, place, work.timeline)
            return self._answer(work, result)

    async def denoise_batch(
        self,
        items: Sequence[BatchItem],
        transport: Transport,
        seconds_left: float | None = None,
        cut_at: float | None = None,
        items_at: str = ITEMS,
    ) -> list[DenoiseAnswer | ServiceError]:
        """All items at once. The queue and the metrics count each as a request. An item's error is its result.

        Items without an answer at `cut_at` fail, so that the answers of the others arrive in time.
        """
        n_begun = 0

        async def end_of(index: int, item: BatchItem) -> DenoiseAnswer | ServiceError:
            nonlocal n_begun
            n_begun += 1
            try:
                with self._tracer.item(index):
                    if isinstance(item, DenoiseRequest):
                        return await self.denoise(item, transport, seconds_left, cut_at)
                    with self._metrics.failure(transport):
                        raise item
            except ServiceError as error:
                return error if error is item else error.at(f"{items_at}[{index}]")
            except Exception:
                log.exception("an item of a batch failed")
                return Internal()

        ends: list[asyncio.Task[DenoiseAnswer | ServiceError]] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                with self._handing_in():
                    for index, item in enumerate(items):
                        async with self._beginning:
                            ends.append(tasks.create_task(end_of(index, item)))
                            await asyncio.sleep(0)
        except asyncio.CancelledError:
            for _ in range(len(items) - n_begun):
                self._metrics.left(transport)
            raise
        return [end.result() for end in ends]

    async def handed_in(self) -> None:
        """Returns once everything that came here before has reached the engine."""
        await _turns()  # whoever has just taken this denoiser begins to use it
        while self._preparing:
            await asyncio.sleep(POLL_SECONDS)
        await _turns()  # the last items reach the engine

    @contextmanager
    def _handing_in(self) -> Iterator[None]:
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def denoise_stream(
        self,
        request: DenoiseRequest,
        transport: Transport,
        seconds_left: float | None = None,
        cut_at: float | None = None,
    ) -> AsyncGenerator[DenoisePass | DenoiseAnswer, None]:
        """Every pass as it is made, and the answer last. Raises as `denoise` does; closing it frees the engine."""
        with self._metrics.request(transport), self.engine.reserve() as place:
            work = await self._prepare(request, seconds_left, stream=True)
            draft = Draft(work.encoding, self.tokenizer)
            async with aclosing(follow(self.engine, work.job, place, work.timeline, cut_at)) as readings:
                step = 0
                async for reading in readings:
                    if isinstance(reading, Result):
                        answer = self._answer(work, reading)
                        break
                    step += 1
                    yield DenoisePass(step=step, level=reading.level, text=draft.after(reading))
        yield answer

    async def _prepare(self, request: DenoiseRequest, seconds_left: float | None, stream: bool = False) -> _Work:
        arrived = self._clock()
        if len(request.text) <= LONG_TEXT:
            encoding = self._encode(request)
        else:  # beside the event loop
            with self._handing_in():
                encoding = await asyncio.to_thread(self._encode, request)
        waits = (seconds_left, None if request.timeout_ms is None else request.timeout_ms / 1e3)
        wait = min((seconds for seconds in waits if seconds is not None), default=None)
        job = build_job(
            request,
            encoding,
            self._config,
            self.limits,
            deadline=None if wait is None else arrived + wait,
            stream=stream,
        )
        return _Work(request, arrived, encoding, job, self._tracer.timeline())

    def _encode(self, request: DenoiseRequest) -> Encoding:
        check_characters(request.text, self.limits)
        encoding = encode(request.text, self.tokenizer, self.limits)
        if request.mask_ratio is None:
            return encoding
        return hide(encoding, self.tokenizer, request.mask_ratio, request.seed or 0)

    def _answer(self, work: _Work, result: Result) -> DenoiseAnswer:
        self._metrics.answered(result, n_masked=sum(work.encoding.masked))
        if work.timeline is not None:
            work.timeline.answered(work.job, result, self.card.label)
        written = write_back(work.encoding, result, self.tokenizer)
        trace = [TracePoint(step=step, level=level) for step, level in enumerate(result.levels, start=1)]
        return DenoiseAnswer(
            text=written.text,
            corrupted_text=None if work.request.mask_ratio is None else work.encoding.text,
            steps=result.steps,
            max_steps=result.max_steps,
            halt_reason=result.reason,
            level=result.levels[-1],
            restored=written.restored,
            trace=trace if work.request.trace else None,
            timing_ms=TimingMs(
                queue=milliseconds(result.queue_seconds),
                compute=milliseconds(result.compute_seconds),
                total=milliseconds(self._clock() - work.arrived),
            ),
            model=self.card.label,
        )


@dataclass(frozen=True)
class _Work:
    """A request on its way through the engine."""

    request: DenoiseRequest
    arrived: float  # on the denoiser's clock, in seconds
    encoding: Encoding
    job: Job
    timeline: Timeline | None


@asynccontextmanager
async def cut(cut_at: float | None) -> AsyncIterator[None]:
    """Ends what is inside at that time on the event loop's clock: `DeadlineExceeded`."""
    try:
        async with asyncio.timeout_at(cut_at):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before there was an answer") from None


def follow(
    engine: Engine, job: Job, place: Place, timeline: Timeline | None, cut_at: float | None
) -> AsyncGenerator[Reading | Result, None]:
    """The reading of every pass, and the result last. Closing the generator takes the job out of the engine before its
    place in the queue is freed.
    """

    async def work(hand_out: Callable[[Reading | Result], None]) -> None:
        def read(reading: Reading) -> None:
            if timeline is not None:
                timeline(reading)
            hand_out(reading)

        async with cut(cut_at):
            hand_out(await engine.submit(job, place, read))

    return pumped(work)


def build_job(
    request: DenoiseRequest,
    encoding: Encoding,
    config: ModelConfig,
    limits: Limits,
    *,
    deadline: float | None = None,
    stream: bool = False,
) -> Job:
    """Options that the request leaves out are the checkpoint's."""
    return Job(
        tokens=encoding.ids,
        masked=encoding.masked,
        max_steps=request.max_steps or min(config.max_steps, limits.max_steps),
        threshold=config.threshold if request.threshold is None else request.threshold,
        halting=request.halting or config.halting,
        top_k=request.top_k or 0,
        decode_all=request.restore == "all",
        deadline=deadline,
        stream=stream,
    )


async def _turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)
