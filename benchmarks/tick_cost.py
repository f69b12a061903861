"""What a tick of the engine costs: constants fitted to measured ticks, or given.

    seconds = tick + token · packed tokens + row · rows decoded + coda · (any row decoded) + request · admitted

`coda` is reading the vocabulary's matrix from memory, which takes as long for one row as for a hundred. The front
end's work on a request (reading, tokenising, answering) is `request` where it shares the engine's core, because it
then delays the engine; on a core of its own it is `outside`, and only the request itself waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from benchmarks.workloads import make_jobs
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Job

if TYPE_CHECKING:
    from rdt_core import RDT

MEASURED_AT = ((128, 1), (256, 64), (512, 64), (2048, 256))
"""Token budgets and most live sequences, from one request alone to full ticks."""
HELD_OUT = 5
"""Every fifth tick judges the fit to the others."""
UNBOUNDED = 2**62


@dataclass(frozen=True)
class TickCost:
    """All in seconds; see above."""

    tick: float
    token: float
    row: float
    coda: float = 0.0
    request: float = 0.0
    outside: float = 0.0

    def seconds(self, n_tokens: int, n_rows: int, n_admitted: int) -> float:
        coda = self.coda + self.row * n_rows if n_rows else 0.0
        return self.tick + self.token * n_tokens + coda + self.request * n_admitted

    def times(self, factor: float) -> TickCost:
        """The same model on an engine so many times slower; the front end is what it was."""
        slower = {name: factor * getattr(self, name) for name in ("tick", "token", "row", "coda")}
        return replace(self, **slower)

    @classmethod
    def read(cls, text: str) -> Self:
        """`tick,token,row[,coda]`, or a JSON file: these names and values, or a saved result with them as `cost`.

        Raises `ValueError` and `OSError`.
        """
        try:
            if not text.endswith(".json"):
                return cls(*map(float, text.split(",")))
            content = json.loads(Path(text).read_text(encoding="utf-8"))
            return cls(**content.get("cost", content))
        except TypeError as error:
            raise ValueError(f"cost is {text}: want tick,token,row[,coda], or a JSON file with these names") from error


class Tick(NamedTuple):
    """One measured tick."""

    n_tokens: int
    n_rows: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A fitted cost, and how well it predicts the ticks that were held out."""

    cost: TickCost
    n_fitted: int
    n_held_out: int
    r2: float
    mean_absolute_error_ms: float
    mean_relative_error: float

    def figures(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items() if name != "cost"}


def fit(ticks: Sequence[Tick]) -> Fit:
    """Least squares, twice: the second time weighted by the first predictions, so that short ticks count as much."""
    seconds = np.array([tick.seconds for tick in ticks])
    terms = np.array([(1, tick.n_tokens, tick.n_rows, tick.n_rows > 0) for tick in ticks], dtype=float)
    held_out = np.arange(len(ticks)) % HELD_OUT == HELD_OUT - 1
    expected = terms @ _least_squares(terms[~held_out], seconds[~held_out])
    weights = 1 / np.maximum(expected, seconds.min())
    constants = _least_squares((terms * weights[:, None])[~held_out], (seconds * weights)[~held_out])
    errors, truth = terms[held_out] @ constants - seconds[held_out], seconds[held_out]
    return Fit(
        TickCost(*constants.tolist()),
        n_fitted=int((~held_out).sum()),
        n_held_out=int(held_out.sum()),
        r2=float(1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum()),
        mean_absolute_error_ms=float(abs(errors).mean() * 1e3),
        mean_relative_error=float(abs(errors / truth).mean()),
    )


def measure(model: RDT, workload: str, requests: int, rounds: int) -> list[Tick]:
    """Ticks of the real engine at several sizes, every round with new requests.

    Ticks are not repeated: a size that was computed before may be faster, and a server meets new sizes.
    """
    ticks: list[Tick] = []
    _run(model, make_jobs(workload, 1, model.config.vocab_size), SchedulerLimits(1024, 1, 1, UNBOUNDED))  # warm
    for seed in range(rounds):
        jobs = make_jobs(workload, requests, model.config.vocab_size, seed)
        for token_budget, max_live in MEASURED_AT:
            ticks += _run(model, jobs, SchedulerLimits(token_budget, max_live, len(jobs), UNBOUNDED))
    return ticks


def _run(model: RDT, jobs: Sequence[Job], limits: SchedulerLimits) -> list[Tick]:
    """All jobs waiting from the start; a tick is timed from plan to commit."""
    from service.engine.eager import EagerBackend  # noqa: PLC0415 - needs torch, which a simulation does not

    scheduler, backend = Scheduler(limits), EagerBackend(model)
    for job in jobs:
        with scheduler.queue.reserve() as place:
            scheduler.queue.join(job, place, now=0.0)
    ticks = []
    while not scheduler.idle:
        began = time.perf_counter()
        plan = scheduler.plan(now=0.0)
        outcome = backend.run(plan)
        scheduler.commit(plan, outcome, now=0.0)
        ticks.append(Tick(plan.n_tokens, outcome.n_decoded, time.perf_counter() - began))
    return ticks


def _least_squares(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants of at least 0; a term that would come out negative is noise and is left out."""
    constants = np.zeros(terms.shape[1])
    kept = np.ones(terms.shape[1], dtype=bool)
    while True:
        constants[kept] = np.linalg.lstsq(terms[:, kept], seconds, rcond=None)[0]
        if (constants >= 0).all():
            return constants
        kept &= constants > 0
        constants[~kept] = 0.0
