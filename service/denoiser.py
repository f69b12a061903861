"""The use case: one request in, one answer out. Transports translate to it and from it, no more.

read    plain values -> a valid request
denoise a place in the queue -> tokens -> the engine -> text
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rdt_core import Encoding, ModelConfig, Tokenizer
from service.engine.engine import Engine
from service.engine.types import Job, Result
from service.limits import Limits
from service.metrics import Metrics, Transport
from service.schema import DenoiseAnswer, DenoiseRequest, ModelCard, TimingMs, TracePoint, read_request
from service.text import check_characters, encode, hide, write_back


class Denoiser:
    """Serves one model. `card` says which; `config` holds the defaults of its requests."""

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
    ) -> None:
        self.card = card
        self.engine = engine
        self._config = config
        self._tokenizer = tokenizer
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        metrics.watch(engine)
        metrics.describe_model(card.name, card.digest, card.device, card.precision)

    def read(self, fields: object) -> DenoiseRequest:
        """Raises `InvalidArgument` naming every bad field."""
        return read_request(fields, self._limits)

    async def denoise(self, request: DenoiseRequest, transport: Transport) -> DenoiseAnswer:
        """Raises `TooLarge`, `InvalidArgument`, and whatever `Engine.reserve` and `Engine.submit` raise."""
        with self._metrics.request(transport):
            arrived = self._clock()
            with self.engine.reserve() as place:
                encoding = self._encode(request)
                deadline = None if request.timeout_ms is None else arrived + request.timeout_ms / 1e3
                job = build_job(request, encoding, self._config, self._limits, deadline)
                result = await self.engine.submit(job, place)
            self._metrics.answered(result, n_masked=sum(encoding.masked))
            return self._answer(request, job, encoding, result, arrived)

    def _encode(self, request: DenoiseRequest) -> Encoding:
        check_characters(request.text, self._limits)
        encoding = encode(request.text, self._tokenizer, self._limits)
        if request.mask_ratio is None:
            return encoding
        hidden = hide(request.text, self._tokenizer, request.mask_ratio, request.seed or 0)
        return encode(hidden, self._tokenizer, self._limits)

    def _answer(
        self, request: DenoiseRequest, job: Job, encoding: Encoding, result: Result, arrived: float
    ) -> DenoiseAnswer:
        reading = write_back(encoding, result, self._tokenizer, rewrite=job.decode_all)
        trace = [TracePoint(step=step, level=level) for step, level in enumerate(result.levels, start=1)]
        return DenoiseAnswer(
            text=reading.text,
            corrupted_text=None if request.mask_ratio is None else encoding.text,
            steps=result.steps,
            max_steps=result.max_steps,
            halt_reason=result.reason,
            level=result.levels[-1],
            restored=reading.restored,
            trace=trace if request.trace else None,
            timing_ms=TimingMs(
                queue=_milliseconds(result.queue_seconds),
                compute=_milliseconds(result.compute_seconds),
                total=_milliseconds(self._clock() - arrived),
            ),
            model=self.card.label,
        )


def build_job(
    request: DenoiseRequest, encoding: Encoding, config: ModelConfig, limits: Limits, deadline: float | None = None
) -> Job:
    """The request's options, and the checkpoint's where it has none."""
    return Job(
        tokens=encoding.ids,
        masked=encoding.masked,
        max_steps=request.max_steps or min(config.max_steps, limits.max_steps),
        threshold=config.threshold if request.threshold is None else request.threshold,
        halting=request.halting or config.halting,
        top_k=request.top_k,
        decode_all=request.restore == "all",
        deadline=deadline,
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
