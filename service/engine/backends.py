"""Which backend suits a model: the one place that knows all of them."""

from __future__ import annotations

from rdt_core.model import RDT
from service.engine.backend import Backend
from service.engine.cuda_graph import CapturedPasses, can_capture
from service.engine.eager import EagerBackend
from service.engine.lookahead import LookaheadBackend

MOST_LIVE_ON_CUDA = 65_534
"""Attention launches a row of blocks for each place. A grid has 65,535 rows, and one place is never a sequence's."""


def make_backend(model: RDT, token_budget: int, max_live: int) -> Backend:
    """Captured passes with lookahead where passes can be captured, eager ones elsewhere.

    Raises `ValueError` for more sequences than CUDA's attention takes.
    """
    if model.device.type == "cuda" and max_live > MOST_LIVE_ON_CUDA:
        raise ValueError(f"max_live is {max_live}: want at most {MOST_LIVE_ON_CUDA} on CUDA")
    if can_capture(model):
        return LookaheadBackend(model, token_budget, max_live, CapturedPasses(model))
    return EagerBackend(model)
