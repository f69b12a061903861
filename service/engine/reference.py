"""Runs one job through the reference loop of `rdt_core`."""

from __future__ import annotations

import torch

from rdt_core import RDT, restore
from service.engine.types import Job, Result


def run_reference(model: RDT, job: Job) -> Result:
    """Restore one sequence, in the calling thread."""
    restoration = restore(
        model,
        torch.tensor(job.tokens),
        torch.tensor(job.masked),
        max_steps=job.max_steps,
        threshold=job.threshold,
        halting=job.halting,
        top_k=job.top_k,
        decode_all=job.decode_all,
    )
    return Result(**vars(restoration), max_steps=job.max_steps)
