"""The gate: how much is left to do, for a sequence and for each masked token.

T: packed tokens   N: sequences   D: model width   G: gate_hidden_dim

The gate reads the hidden state detached, so its loss never moves the encoder. It speaks twice:

- the **level** of a sequence, a share of `total_steps`: how many passes until its predictions stop
  changing. Each pass multiplies the last level by a factor in (0, 1), so it never rises.
- the **token level** of each masked row: how likely its best guess is wrong, in the model's own eyes. It foretells what
  decoding the row would say, the probability of all other tokens, for less than a hundredth of its operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core.packing import Packing, sequence_mean


class GateState(NamedTuple):
    """What the gate carries from pass to pass; float32 whatever the model's precision."""

    level: Tensor  # (N,) in [0, 1], 1 before the first pass
    summary: Tensor  # (N, G) mean features of the masked rows
    token_level: Tensor  # (T,) in [0, 1], 0 where nothing is masked


class Gate(nn.Module):
    def __init__(self, d_model: int, gate_hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.features = nn.Linear(d_model, gate_hidden_dim)
        self.token = nn.Linear(gate_hidden_dim, 1)
        self.mix = nn.Linear(2 * gate_hidden_dim + 1, gate_hidden_dim)
        self.sequence = nn.Linear(gate_hidden_dim, 1)

    def start(self, packing: Packing) -> GateState:
        """The state before the first pass: everything is left."""
        device = packing.positions.device
        return GateState(
            level=torch.ones(packing.n_sequences, device=device),
            summary=torch.zeros(packing.n_sequences, self.features.out_features, device=device),
            token_level=torch.ones(packing.n_tokens, device=device),
        )

    def forward(self, hidden: Tensor, masked: Tensor, packing: Packing, state: GateState) -> GateState:
        """One reading. hidden `(T, D)`, masked `(T,)` bool, state of the pass before -> the new state.

        A sequence without masked rows has nothing left: its level is 0.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            features = F.gelu(self.features(self.norm(hidden.detach().float())))  # (T, G)
            summary = sequence_mean(features, masked, packing)  # (N, G)
            seen = torch.cat((summary, summary - state.summary, state.level[:, None]), dim=1)
            shrink = torch.sigmoid(self.sequence(F.gelu(self.mix(seen))).squeeze(1))  # (N,)
            token_level = torch.sigmoid(self.token(features).squeeze(1)) * masked  # (T,)
            masks = torch.zeros_like(state.level).index_add_(0, packing.sequence_ids, masked.float())
            return GateState(state.level * shrink * (masks > 0), summary, token_level)
