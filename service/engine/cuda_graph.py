"""A pass captured once for each size of batch, and replayed: one launch for the host instead of hundreds.

A graph reads and writes fixed slots (`static_batch`). Where sequences begin is read on the device (variable-length
attention). So one graph serves every batch of its size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from weakref import WeakSet

import torch

from rdt_core.layers import has_varlen_attention
from rdt_core.memory import shortage
from rdt_core.model import RDT
from rdt_core.precision import DTYPES
from service.engine.static_batch import Bucket, Buffers, Size, one_pass
from service.process import garbage

log = logging.getLogger(__name__)

_CAPTURING = threading.Lock()
"""A process may have one capture under way, on whichever card."""

_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed, kept for ever: torch's allocator (2.11) may go on using such a graph."""

STREAMS = 32
"""Of a card; torch hands out the same ones in turn."""

_LIVING: WeakSet[CapturedPasses] = WeakSet()
_CHOOSING = threading.Lock()  # a stream, by which ones the living have

WARM_PASSES = 2
"""Before a capture: libraries choose their kernels and take their workspaces the first time, outside of a graph."""


def can_capture(model: RDT) -> bool:
    """Whether there is variable-length attention, which needs no lengths on the host: on CUDA from Ampere on, in half
    precision, with most head widths.
    """
    head_width = model.config.d_model // model.config.n_heads
    return has_varlen_attention(model.device, DTYPES.get(model.precision, torch.float32), head_width)


class CapturedPasses:
    """`Passes` by CUDA graphs; once a capture fails, by plain launches. One for each backend, since it holds addresses.

    Raises `ValueError` for a model that it cannot capture: other attention would keep the lengths of one batch. And for
    one more than its card has streams.
    """

    def __init__(self, model: RDT) -> None:
        if not can_capture(model):
            raise ValueError(f"no variable-length attention on {model.device} in {model.precision}: want eager passes")
        self._model = model
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        with _CHOOSING:
            self._stream = _free_stream(model.device)  # torch's own may be of another card, the first to capture
            _LIVING.add(self)
        self._captures = True
        self._made: list[torch.cuda.CUDAGraph] = []  # failed ones too: deleting one frees the workspace of its stream
        self._plain: set[int] = set()  # sizes that there was memory to compute but not to capture

    @property
    def graphs(self) -> Collection[int]:
        """Sizes of batches, in rows, that have been captured."""
        return self._graphs.keys()

    def prepare(self, buffers: Buffers, sizes: Sequence[Size]) -> None:
        """All sizes, the largest first, since what it takes of the shared pool is enough for the others.

        Those that there is no memory for are left out: a tick that large will say so itself.
        """
        for size in reversed(sizes):
            try:
                self._capture(buffers, size)
            except RuntimeError as error:
                if not shortage(error):
                    raise
                log.warning("no memory for passes of %d rows: %s", size.n_rows, error)
            if not self._captures:
                break
            if size.n_rows not in self._graphs:  # after `except`, where the error no longer holds tensors
                torch.cuda.empty_cache()

    def __call__(self, buffers: Buffers, bucket: Bucket) -> None:
        if self._captures and bucket.n_rows not in self._graphs and bucket.n_rows not in self._plain:
            self._capture(buffers, Size(bucket.n_rows, bucket.n_slots))
        graph = self._graphs.get(bucket.n_rows)
        if graph is None:
            one_pass(self._model, buffers, bucket)
        else:
            graph.replay()

    def _capture(self, buffers: Buffers, size: Size) -> None:
        """Raises what a pass raises, above all when there is not enough memory for it."""
        held = [buffer.clone() for buffer in buffers]  # warming passes overwrite them
        try:
            with _CAPTURING:
                bucket = self._any_batch(buffers, size)
                self._warm(buffers, bucket)
                with garbage.left_alone():  # collecting an old graph would break the capture
                    self._record(buffers, bucket)
        finally:
            for buffer, was in zip(buffers, held, strict=True):
                buffer.copy_(was)

    def _warm(self, buffers: Buffers, bucket: Bucket) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_PASSES):
                    one_pass(self._model, buffers, bucket)
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, buffers: Buffers, bucket: Bucket) -> None:
        """Where that fails for want of memory, this size is launched plainly from now on; otherwise, every size."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._made.append(graph)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                one_pass(self._model, buffers, bucket)
        except RuntimeError as error:
            log.warning(
                "passes of %d rows cannot be captured, but launched one kernel at a time: %s", bucket.n_rows, error
            )
            if shortage(error):
                self._plain.add(bucket.n_rows)
            else:
                # Where capturing fails for another reason, torch may give no memory back to the device until a restart.
                self._captures = False
                _FAILED.append(graph)
                self._graphs.clear()
                self._made.clear()
        else:
            self._graphs[bucket.n_rows] = graph
        finally:
            torch.cuda.set_stream(before)  # torch does not if it is the end of the capture that fails

    def _any_batch(self, buffers: Buffers, size: Size) -> Bucket:
        """The same for all batches of the size: nothing of a layout but its slots is baked into a graph."""
        longest = min(size.n_rows, self._model.config.max_seq_len)
        return buffers.bucket(size, lengths=(longest,), longest_live=longest)


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """One that no other `CapturedPasses` has: where a graph goes, torch (2.13) frees the workspace of its stream, and
    other graphs of that stream would write to it all the same.
    """
    taken = {passes._stream for passes in _LIVING}
    free = next((one for one in (torch.cuda.Stream(device) for _ in range(STREAMS)) if one not in taken), None)
    if free is None:
        raise ValueError(f"{device} has {STREAMS} streams, all taken: want fewer replicas")
    return free
