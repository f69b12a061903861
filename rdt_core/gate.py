"""The gate: how much is left to do, for a sequence and for each masked token.

T: packed tokens   N: sequences   M: masked rows   D: model width   G: gate_hidden_dim   K: gate_shortlist

The gate reads the hidden state detached, so its loss never moves the encoder. It has two outputs:

- the **level** of a sequence, a share of `total_steps`: how many passes until its predictions stop
  changing. Each pass multiplies the last level by a factor in (0, 1), so it never rises.
- the **token level** of a masked row, computed only on request: how likely the row's best guess is wrong by the model's
  own probabilities. It predicts what decoding would say, the probability of all tokens but the best.

A small network that reads the hidden state alone predicts that badly. The logits of a **shortlist** predict it well:
the `K` tokens with the largest output bias, which are the most frequent ones. With 1,024 of 30,522 tokens, the best
guess of seven rows in eight is among them, and of more where the model is sure. The network only has to predict how
much probability the other tokens have, and how much the best of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core.packing import Packing, sequence_sum
from rdt_core.rows import few_outputs, same_sums


class GateState(NamedTuple):
    """What the gate carries from pass to pass; float32 whatever the model's precision."""

    level: Tensor  # (N,) in [0, 1], 1 before the first pass
    summary: Tensor  # (N, G) mean features of the masked rows


class Gate(nn.Module):
    """`n_others`: tokens of the vocabulary that are not on the shortlist; None without one."""

    def __init__(self, d_model: int, gate_hidden_dim: int, n_others: int | None = None) -> None:
        super().__init__()
        self.log_others = None if n_others is None else math.log(max(n_others, 1))
        self.norm = nn.LayerNorm(d_model)
        self.features = nn.Linear(d_model, gate_hidden_dim)
        self.token = nn.Linear(gate_hidden_dim, 1 if n_others is None else 2)
        self.mix = nn.Linear(2 * gate_hidden_dim + 1, gate_hidden_dim)
        self.sequence = nn.Linear(gate_hidden_dim, 1)

    def start(self, packing: Packing) -> GateState:
        """The state before the first pass: everything is left."""
        device = packing.positions.device
        return GateState(
            level=torch.ones(packing.n_sequences, device=device),
            summary=torch.zeros(packing.n_sequences, self.features.out_features, device=device),
        )

    def forward(self, hidden: Tensor, masked: Tensor, packing: Packing, state: GateState) -> GateState:
        """One reading. hidden `(T, D)`, masked `(T,)` bool, state of the pass before -> the new state.

        A sequence without masked rows has nothing left: its level is 0.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            features = self._features(hidden)  # (T, G)
            n_masked = sequence_sum(masked.float(), packing)  # (N,)
            summary = sequence_sum(features * masked[:, None], packing) / n_masked.clamp(min=1)[:, None]  # (N, G)
            seen = torch.cat((summary, summary - state.summary, state.level[:, None]), dim=1)
            mixed = F.gelu(same_sums(self.mix, seen))
            shrink = torch.sigmoid(few_outputs(self.sequence, mixed)).squeeze(1).float()  # (N,)
            return GateState(state.level * shrink * (n_masked > 0), summary)

    def token_level(self, hidden: Tensor, shortlisted: Tensor | None) -> Tensor:
        """hidden `(M, D)`, logits of the shortlist `(M, K)`, None without one -> `(M,)` in [0, 1].

        One minus `exp(best - log-sum-exp)` over all tokens. For the tokens not on the shortlist the gate estimates
        their log-sum-exp, and how far the best logit lies below it. Without a shortlist it estimates the level itself.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            gap, *others = few_outputs(self.token, self._features(hidden)).unbind(1)
            if shortlisted is None or self.log_others is None:
                return torch.sigmoid(gap).float()
            # The log-sum-exp of the other tokens, as an offset from that of as many zeros.
            mass = others[0] + self.log_others
            top = shortlisted.amax(1).clamp(min=torch.finfo(shortlisted.dtype).min)  # (M,), not minus infinity
            listed = top + (shortlisted - top[:, None]).exp().sum(1).double().log()  # log-sum-exp of the shortlist
            best = torch.maximum(top.double(), mass - F.softplus(gap))
            return -torch.expm1(best - torch.logaddexp(listed, mass)).clamp(max=0.0).float()

    def _features(self, hidden: Tensor) -> Tensor:
        return F.gelu(same_sums(self.features, self.norm(hidden.detach().float())))
