"""Runs one job through the reference loop of `rdt_core`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rdt_core import RDT, restore
from service.engine.types import Job, Result


def run_reference(model: RDT, job: Job, after_pass: Callable[[], None], out_of_time: Callable[[], bool]) -> Result:
    """Restore one sequence. `after_pass()` is called after every pass and may raise to stop it;
    once `out_of_time()` is true, what is there is decoded and returned.
    """
    restoration = restore(
        model,
        torch.tensor(job.tokens),
        torch.tensor(job.masked),
        max_steps=job.max_steps,
        threshold=job.threshold,
        halting=job.halting,
        top_k=job.top_k,
        decode_all=job.decode_all,
        observe=lambda _step, _level, _state: after_pass(),
        out_of_time=out_of_time,
    )
    return Result(**vars(restoration), max_steps=job.max_steps)
