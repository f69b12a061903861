"""Compiles the encoder's layers with `torch.compile`."""

from __future__ import annotations

import torch

from rdt_core.layers import EncoderLayer, SelfAttention
from rdt_core.model import RDT


def compile_layers(model: RDT, backend: str = "inductor") -> None:
    """Norms, activations and rotary positions are fused, for any lengths; the first steps wait for the compiler.

    Attention stays as it is: it would be compiled anew for every length. Weights and their names do not change.
    """
    for module in model.encoder.modules():
        if isinstance(module, SelfAttention):
            module.attend = torch.compiler.disable(module.attend)
    for layer in model.encoder:
        assert isinstance(layer, EncoderLayer)
        layer.compile(backend=backend, dynamic=True)
