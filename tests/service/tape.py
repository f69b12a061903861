"""A CUDA graph on a CPU: it records the operations of a pass, and carries out those, and nothing of Python, again.

What a real graph bakes in is baked in here: addresses, shapes, and every number that Python computed on the way. What a
capture forbids fails here, too: asking the device for a value, and sending it one. Nothing is computed while recording,
and results of the last replay are gone at the next, since graphs share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen  # registers the operation
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_ASKS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal, _aten.item}
_SENDS = {_aten.lift_fresh, _aten.lift_fresh_copy}
_VARLEN = torch.ops.torch_attn._varlen_attn


class Operation(NamedTuple):
    carry_out: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    made: list[Tensor]  # memory of its own that it writes to, in the order of what it returns


class Tape(TorchDispatchMode):
    """Records while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        by_mask = packet in (_aten.index, _aten.index_put, _aten.index_put_) and any(
            chosen is not None and chosen.dtype == torch.bool for chosen in args[1]
        )
        if packet in _ASKS | _SENDS or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        carry_out = _varlen_on_cpu if packet is _VARLEN else func
        if func._schema.is_mutable:
            self.operations.append(Operation(carry_out, args, kwargs, []))
            return args[0]
        result = carry_out(*args, **kwargs)
        given = _memory((args, kwargs))
        made = [tensor for tensor in _tensors(result) if not _memory(tensor) <= given]
        if made:  # all others are views of what was there
            self.operations.append(Operation(carry_out, args, kwargs, made))
            _spoil(made)
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for operation in self.operations:
            _spoil(operation.made)
        for operation in self.operations:
            result = operation.carry_out(*operation.arguments, **operation.options)
            if operation.made:
                for place, tensor in zip(operation.made, _tensors(result), strict=True):
                    place.copy_(tensor)


def _varlen_on_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The variable-length kernel: it reads where sequences begin when it runs, and leaves rows of none unwritten."""
    begins, begins_k, longest, longest_k, *_ = rest
    assert begins is begins_k
    assert begins.dtype == torch.int32, "as the kernel wants it"
    assert longest == longest_k >= int(begins.diff().max()), "attention is launched for so many tokens of a sequence"
    out = torch.full_like(query, torch.nan)
    for start, end in pairwise(begins.tolist()):
        if start < end:
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            out[start:end] = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    return out, query.new_empty(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _memory(values: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(values)}


def _spoil(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0)
