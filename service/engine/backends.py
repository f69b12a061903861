"""Which backend suits a model: the one place that knows all of them."""

from __future__ import annotations

import torch

from rdt_core.layers import has_varlen_attention
from rdt_core.model import RDT
from rdt_core.precision import DTYPES
from service.engine.backend import Backend
from service.engine.cuda_graph import CapturedPasses
from service.engine.eager import EagerBackend
from service.engine.lookahead import LookaheadBackend

MOST_LIVE_ON_CUDA = 65_534
"""Attention launches a row of blocks for each place. A grid has 65,535 rows, and one place is never a sequence's."""


def make_backend(model: RDT, token_budget: int, max_live: int) -> Backend:
    """Captured passes with lookahead where there is variable-length attention, which needs no lengths on the host: on
    CUDA from Ampere on, in half precision, with most head widths. Eager passes elsewhere.

    Raises `ValueError` for more sequences than CUDA's attention takes.
    """
    if model.device.type == "cuda" and max_live > MOST_LIVE_ON_CUDA:
        raise ValueError(f"max_live is {max_live}: want at most {MOST_LIVE_ON_CUDA} on CUDA")
    head_width = model.config.d_model // model.config.n_heads
    if has_varlen_attention(model.device, DTYPES.get(model.precision, torch.float32), head_width):
        return LookaheadBackend(model, token_budget, max_live, CapturedPasses(model))
    return EagerBackend(model)
