"""Four ways of serving the same requests with the same weights.

`static` is ordinary dynamic batching at its best, as `benchmarks.peer_servers` run it behind other servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.peer_servers import batched
from rdt_core import RDT, restore
from rdt_core.flops import sequence_flops, unread_flops
from rdt_core.inference import Restoration
from service.engine.backend import Backend
from service.engine.eager import EagerBackend
from service.engine.scheduler import Scheduler, SchedulerLimits
from service.engine.types import Job, Result, Ticket

STATIC_SIZES = (1, 2, 4, 8, 16, 32)


def loop(model: RDT, jobs: Sequence[Job]) -> None:
    """The reference, one request after another."""
    for job in jobs:
        restored(model, job)


def restored(model: RDT, job: Job) -> Restoration:
    """One request by the reference."""
    return restore(
        model, torch.tensor(job.tokens, device=model.device), torch.tensor(job.masked, device=model.device),
        max_steps=job.max_steps, threshold=job.threshold, halting=job.halting,
    )  # fmt: skip


def static(model: RDT, jobs: Sequence[Job], size: int) -> None:
    """Padded batches of `size` in the given order."""
    for batch in batches(jobs, size):
        batched.restore(model, batch)


def with_depths(model: RDT, jobs: Sequence[Job]) -> list[Job]:
    """The same jobs with `max_steps` set to the number of passes after which the gate halts them."""
    return [replace(job, max_steps=restored(model, job).steps, threshold=0.0) for job in jobs]


def by_cost(jobs: Sequence[Job]) -> list[Job]:
    """Sorted by depth (which the mask ratio predicts), then by length: the best order for static batches."""
    return sorted(jobs, key=lambda job: (job.max_steps, len(job.tokens)))


def batches(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def ours(model: RDT, jobs: Sequence[Job], token_budget: int, max_live: int) -> None:
    """The server's scheduler and backend, all requests waiting from the start."""
    serve(EagerBackend(model), jobs, token_budget, max_live)


def serve(
    backend: Backend, jobs: Sequence[Job], token_budget: int, max_live: int, queued: list[int] | None = None
) -> list[Result]:
    """The same with any backend; the results in the order of the jobs. `queued` gets how many waited in each tick."""
    tokens = sum(len(job.tokens) for job in jobs)
    scheduler = Scheduler(SchedulerLimits(token_budget, max_live, max_waiting=len(jobs), max_waiting_tokens=tokens))
    tickets: list[Ticket] = []
    results: dict[Ticket, Result] = {}
    for job in jobs:
        with scheduler.queue.reserve() as place:
            tickets.append(scheduler.queue.join(job, place, now=0.0))
    while not scheduler.idle:
        plan = scheduler.plan(now=0.0)
        if queued is not None:
            queued.append(scheduler.queue.n_queued)
        results.update(scheduler.commit(plan, backend.run(plan), now=0.0))
    return [results[ticket] for ticket in tickets]


def useful_flops(model: RDT, jobs: Sequence[Job]) -> int:
    """What the answers need: every token its own sequence's passes, every masked row one decoding."""
    return sum(_needed_flops(model, len(job.tokens), sum(job.masked), job.max_steps) for job in jobs)


def static_flops(model: RDT, jobs: Sequence[Job], size: int) -> int:
    """What padded batches need: every sequence as long as the longest, and as many passes as the deepest."""
    return sum(
        _needed_flops(
            model, max(len(one.tokens) for one in batch), sum(job.masked), max(one.max_steps for one in batch)
        )
        for batch in batches(jobs, size)
        for job in batch
    )


def _needed_flops(model: RDT, length: int, n_masked: int, steps: int) -> int:
    """Of one sequence, of whose last pass only masked rows are read."""
    all_rows = sequence_flops(model.config, length, n_masked, steps)
    return all_rows - (length - n_masked) * unread_flops(model.config)
