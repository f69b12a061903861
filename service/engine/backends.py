"""Which backend suits a model: the one place that knows all of them."""

from __future__ import annotations

from rdt_core.model import RDT
from service.engine.backend import Backend
from service.engine.cuda_graph import CapturedPasses
from service.engine.eager import EagerBackend
from service.engine.lookahead import LookaheadBackend


def make_backend(model: RDT, token_budget: int, max_live: int) -> Backend:
    """On CUDA in half precision captured passes, launched ahead. In other formats attention asks the host how long
    sequences are, and on a CPU there is nobody to run ahead of.
    """
    if model.device.type == "cuda" and model.precision in ("bf16", "fp16"):
        return LookaheadBackend(model, token_budget, max_live, CapturedPasses(model))
    return EagerBackend(model)
