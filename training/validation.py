"""Validation: the loss and the exact match on text that the model does not learn from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rdt_core.model import RDT
from training.config import TrainConfig
from training.data import Batches
from training.losses import gate_losses, reconstruction
from training.processes import OneProcess, Processes, share


class Validation(NamedTuple):
    """Means over the same batches every time."""

    total_loss: float
    recon_loss: float  # nats a masked token after the last pass
    gate_loss: float
    exact_match: float  # share of masked tokens restored, same depth
    exact_match_one_pass: float


@torch.no_grad()
def validate(
    model: RDT,
    batches: Batches,
    config: TrainConfig,
    processes: Processes | None = None,
    *,
    n_passes: int | None = None,
) -> Validation:
    """After `n_passes`, by default `max_chain_length`, over the batches that have a word to restore. The same with any
    number of processes: each takes its share of the batches.
    """
    processes = processes or OneProcess()
    model.eval()
    section, device = config.training, model.device
    depth = n_passes or section.max_chain_length
    sums = torch.zeros(5, dtype=torch.float64)
    for index in share(range(1), config.output.eval_batches, processes):
        batch = batches[index].to(device)
        packing = batch.packing(device)
        rows = batch.masked.nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        states = model.recursive_forward(batch.tokens, batch.masked, packing, depth, rows=rows)
        some = batch.first(section.gate_sequences)
        sums += torch.tensor(
            [
                1.0,
                reconstruction(model, states[-1].hidden, packing, rows, batch.targets).item(),
                gate_losses(model, some, some.packing(device), section, settle=False).item(),
                *(
                    (model.decode(state.hidden, packing, rows).argmax(-1) == batch.targets[rows]).double().mean().item()
                    for state in (states[-1], states[0])
                ),
            ]
        )
    sums = processes.add_up(sums.to(device))
    recon, gate, exact, exact_one = (sums[1:] / sums[0]).tolist()
    total = section.loss_weight_recon * recon + section.loss_weight_gate * gate
    return Validation(total, recon, gate, exact, exact_one)
