"""Cross-entropy over the whole vocabulary at a lower cost of its logits.

M: rows   D: model width   V: vocabulary

At V = 30,522 the logits of a batch are its largest tensors by far, and autograd walks over them some ten
times: float32 copies, log-softmax, zeros to scatter into, and all of it again on the way back. Here the gradient of
the logits, `softmax - one-hot`, is written over the logits at once and kept for the backward pass, whose two products
are all that is left to do. Compare Liger Kernel (Hsu et al., 2024) and Cut Cross-Entropy (Wijmans et al., 2025).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def vocabulary_loss(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32, of `features @ weight.T + bias` against targets; 0 without rows.

    With gradients, the loss of a row is at most 87 nats, because a probability below the smallest float32 counts as
    that. It is infinite where the bias is minus infinity.

    features `(M, D)`, weight `(V, D)`, bias `(V,)`, targets `(M,)` -> `()`. The products are made in autocast's
    number format where it is on.
    """
    n_rows = max(len(targets), 1)
    if not torch.is_grad_enabled():
        return F.cross_entropy(F.linear(features, weight, bias).float(), targets, reduction="sum") / n_rows
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _SummedLoss.apply(features.to(dtype), weight, bias, targets)
    return loss / n_rows


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' losses; products in the features' number format."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        matrix = weight.to(features.dtype)  # (V, D)
        logits = torch.addmm(bias.to(features.dtype), features, matrix.t())  # (M, V)
        wanted = (torch.arange(len(targets), device=targets.device), targets)
        impossible = logits[wanted].isneginf()  # (M,)
        gradient = torch.softmax(logits, dim=-1, out=logits)
        probability = gradient[wanted]  # (M,)
        gradient[wanted] = probability - 1
        ctx.save_for_backward(gradient, features, matrix)
        least = torch.finfo(torch.float32).tiny
        return -probability.float().clamp(min=least).masked_fill(impossible, 0.0).log().sum()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gradient, features, matrix = ctx.saved_tensors
        scale = scales[0].to(features.dtype)
        ones = features.new_ones(1, len(features))
        of_weight = gradient.t() @ (features * scale)
        of_bias = ((ones * scale) @ gradient)[0]
        return (gradient @ matrix) * scale, of_weight.float(), of_bias.float(), None
