"""CUDA on a CPU, for tests: a graph that is recorded and replayed, and a card that works when it is waited for.

What a real graph bakes in is baked in here: addresses, shapes, and every number that Python computed on the way. What
makes the host wait for a card, or sends it something while a graph is recorded, is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen  # registers the operation
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_ASKS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal, _aten.item}
_SENDS = {_aten.lift_fresh, _aten.lift_fresh_copy}
_INDEXES = {_aten.index, _aten.index_put, _aten.index_put_}
_VARLEN = torch.ops.torch_attn._varlen_attn


class Operation(NamedTuple):
    carry_out: Callable[[], Any]
    made: list[Tensor]  # memory of its own that it writes to, in the order of what it returns

    def again(self) -> None:
        result = self.carry_out()
        if self.made:
            for place, tensor in zip(self.made, _tensors(result), strict=True):
                place.copy_(tensor)


class Tape(TorchDispatchMode):
    """A graph: records while it is entered, and computes nothing. A replay is of operations, and of nothing in Python.

    Results of the last replay are gone at the next, since graphs share their memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _waits(func, args) or func.overloadpacket in _SENDS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result, operation = _put_off(func, args, kwargs or {})
        if operation is not None:
            self._operations.append(operation)
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for operation in self._operations:
            _spoil(operation.made)
        for operation in self._operations:
            operation.again()


class Card(TorchDispatchMode):
    """While it is entered, whatever touches the card's memory is carried out when its result is waited for, in order.

    Values that are read before hold nonsense. The memory is that of the tensors given, and all that is computed of it.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self._held: dict[int, Tensor] = {}  # by address, which nobody else gets while it is held
        self._hold(tensors)
        self._queue: deque[Operation] = deque()
        self._n_done = 0

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _memory((args, kwargs)) & self._held.keys():
            return func(*args, **kwargs)
        if _waits(func, args) or (func.overloadpacket in _INDEXES and not self._all_here(args)):
            raise RuntimeError(f"the card is waited for: {func}")
        result, operation = _put_off(func, args, kwargs)
        if operation is not None:
            self._queue.append(operation)
            self._hold(_tensors(result))
        return result

    def to_device(self, values: Tensor, device: object) -> Tensor:
        """As `rdt_core.packing.to_device` does it on a real card."""
        if device is None:
            return values
        sent = values.clone()
        self._hold([sent])
        return sent

    def to_host(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """As `service.engine.lookahead.to_host` does it on a real card."""
        copies = tuple(tensor.clone() for tensor in tensors)
        with _disable_current_modes():
            for copy in copies:
                copy.fill_(-1)  # no level, no reason to go on, no token
        return copies, partial(self._wait, self._n_done + len(self._queue))

    def _all_here(self, args: tuple[Any, ...]) -> bool:
        """Rows, or numbers to write there, that are the host's would have to be sent first."""
        return all(_memory(tensor) <= self._held.keys() for tensor in _tensors(args))

    def _wait(self, until: int) -> None:
        with _disable_current_modes():
            while self._n_done < until:
                self._queue.popleft().again()
                self._n_done += 1

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            for address in _memory(tensor):
                self._held.setdefault(address, tensor)


def _put_off(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Operation | None]:
    """What an operation returns, without its values, and what is to be carried out; None where it is but a view."""
    carry_out = partial(_varlen if func.overloadpacket is _VARLEN else func, *args, **kwargs)
    if func._schema.is_mutable:
        return args[0], Operation(carry_out, [])
    given = _memory((args, kwargs))
    result = carry_out()
    made = [tensor for tensor in _tensors(result) if not _memory(tensor) <= given]
    _spoil(made)
    return result, Operation(carry_out, made) if made else None


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host has to know a value of the card's before it can go on."""
    by_mask = func.overloadpacket in _INDEXES and any(i is not None and i.dtype == torch.bool for i in args[1])
    return by_mask or func.overloadpacket in _ASKS


def _varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
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
    """Addresses, without that of tensors that have no elements."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(values)} - {0}


def _spoil(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0)
