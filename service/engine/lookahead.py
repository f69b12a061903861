"""The next pass is launched before the last one has been read, so that the device never waits for the host.

T: rows of the bucket   N: its sequences   D: model width   G: features of the gate   R: rows decoded

Halting is decided on the device. A sequence that has halted is frozen in place: the pass that is launched before the
host knows of it leaves it untouched and does not count. One tick is

    arrange   rows of those that go on close up, newcomers' join           device-side gathers, when membership changed
    launch    one pass over a bucket of fixed size, levels and reasons      in fixed slots: `static_batch`
    collect   the readings of the tick before, and what was decoded for it  one small read-back
    decode    the rows of those that have made their last pass              launched now, collected in the next tick

so a reading is reported one tick late. Of a sequence that reaches its ceiling or its deadline the host knows beforehand
which pass is the last, and has it decoded at once. One that the gate stops earlier is in one pass more, and its last
reading is reported two ticks late. Sequences that settle or are streamed have to be read after every pass: they take
the eager way alongside.

Everything here runs on a CPU too, where nothing is asynchronous and the answers must be those of `EagerBackend`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdt_core.model import RDT
from rdt_core.packing import Packing, to_device
from service.engine.batch_halting import GO_ON, REASONS
from service.engine.eager import Decoded, EagerBackend
from service.engine.memory import or_out_of_memory
from service.engine.static_batch import (
    Bucket,
    Buffers,
    Passes,
    PlainPasses,
    Size,
    close_up,
    lay_out,
    sizes_up_to,
)
from service.engine.types import Admission, Choice, Job, Outcome, Plan, Reading, Ticket


@dataclass(eq=False)
class LiveSequence:
    """A sequence in the static batch. Its masked rows are the job's until the end: nothing settles here."""

    ticket: Ticket
    job: Job
    ceiling: int  # passes it may make
    first_row: int  # of the bucket
    n_launched: int = 0  # passes

    @property
    def is_at_its_ceiling(self) -> bool:
        return self.n_launched >= self.ceiling

    @property
    def rows(self) -> range:
        """Where it lies in the bucket."""
        return range(self.first_row, self.first_row + len(self.job.tokens))

    @cached_property
    def due_rows(self) -> list[int]:
        """Which of its tokens are decoded at its end, counted from its own first."""
        return [row for row, masked in enumerate(self.job.masked) if masked or self.job.decode_all]


class Launched(NamedTuple):
    """A pass on its way: who was in it, in the order of slots, and what will be read of it."""

    sequences: list[LiveSequence]
    level: Tensor  # (N,) on the host, once `done`
    reason: Tensor  # (N,) on the host, once `done`
    done: Callable[[], None]  # waits


class Decoding(NamedTuple):
    """Rows of sequences that have made their last pass, on their way through the vocabulary. What came of the pass is
    read with the others of that tick: those that were frozen in it have kept theirs.
    """

    ended: list[LiveSequence]
    decoded: Decoded  # on the host, once `done`
    done: Callable[[], None]


class LookaheadBackend:
    """A `Backend` whose outcomes come a tick late. `passes` carries out a pass over the static batch."""

    ticks_late = 1

    def __init__(self, model: RDT, token_budget: int, max_live: int, passes: Passes | None = None) -> None:
        self._model = model
        self._sizes = sizes_up_to(token_budget, max_live)
        self._buffers = Buffers.of(model, *self._sizes[-1])
        self._passes: Passes = passes or PlainPasses(model)
        self._prepared = False
        self._eager = EagerBackend(model)
        self._forget()

    def reset(self) -> None:
        self._forget()
        self._eager.reset()

    @torch.inference_mode()
    def run(self, plan: Plan) -> Outcome:
        with on_device(self._model.device):
            return or_out_of_memory(lambda: self._run(plan))

    def _forget(self) -> None:
        self._sequences: list[LiveSequence] = []  # in the order of their slots
        self._bucket: Bucket | None = None
        self._launched: Launched | None = None
        self._decoding: Decoding | None = None

    def _run(self, plan: Plan) -> Outcome:
        if not self._prepared:
            self._passes.prepare(self._buffers, self._sizes)
            self._prepared = True
        self._arrange(plan)
        launched = self._launch(plan.overdue)
        beside = self._run_beside(plan)  # it waits for the device, which by now has something to do
        if self._launched is not None:
            self._launched.done()  # decoding comes after that pass, whose time is not decoding's
        began = time.perf_counter()
        chosen = self._collect_decoded()
        decode_seconds = time.perf_counter() - began
        n_decoded = sum(map(len, chosen.values()))
        told, halted = self._collect(chosen)
        self._launched = launched
        stopped = halted | plan.overdue
        self._decode([one for one in self._sequences if one.ticket in stopped or one.is_at_its_ceiling])
        return Outcome(
            readings=told | beside.readings,
            n_decoded=n_decoded + beside.n_decoded,
            decode_seconds=decode_seconds + beside.decode_seconds,
        )

    def _run_beside(self, plan: Plan) -> Outcome:
        """Those that have to be read after every pass."""
        admitted = tuple(a for a in plan.admitted if a.job.read_every_pass)
        beside = {*self._eager.tickets, *(a.ticket for a in admitted)}
        live, dropped = (tuple(t for t in tickets if t in beside) for tickets in (plan.live, plan.dropped))
        return self._eager.run(replace(plan, admitted=admitted, dropped=dropped, live=live))

    def _arrange(self, plan: Plan) -> None:
        """Those that have ended or were dropped go, and newcomers join."""
        newcomers = [a for a in plan.admitted if not a.job.read_every_pass]
        ended = () if self._decoding is None else self._decoding.ended
        stay = set(plan.live).difference(one.ticket for one in ended)
        kept = [(slot, one) for slot, one in enumerate(self._sequences) if one.ticket in stay]
        if not newcomers and len(kept) == len(self._sequences):
            return
        if kept and len(kept) < len(self._sequences):
            close_up(self._buffers, [(slot, one.rows) for slot, one in kept])
        self._sequences = [one for _, one in kept]
        first_row = 0
        for one in self._sequences:
            one.first_row, first_row = first_row, first_row + len(one.job.tokens)
        if newcomers:
            self._begin(newcomers, first_row)
        lengths = [len(one.job.tokens) for one in self._sequences]
        self._bucket = lay_out(self._buffers, lengths, self._fitting(lengths)) if lengths else None

    def _fitting(self, lengths: list[int]) -> Size:
        n_rows, n_live = sum(lengths), len(lengths)
        return next(size for size in self._sizes if size.n_rows >= n_rows and size.n_slots > n_live)

    def _begin(self, admitted: list[Admission], first_row: int) -> None:
        """The prelude of all newcomers at once, behind those that are there."""
        buffers, jobs = self._buffers, [a.job for a in admitted]
        first_slot = len(self._sequences)
        packing = Packing.of([len(job.tokens) for job in jobs], self._model.device)
        tokens, masked, ceiling, threshold = self._sent(
            chain.from_iterable(job.tokens for job in jobs),
            chain.from_iterable(job.masked for job in jobs),
            (a.ceiling for a in admitted),
            np.array([job.threshold for job in jobs], np.float64).view(np.int64),
        )
        masked = masked.bool()
        state = self._model.begin(tokens, masked, packing)
        rows, slots = slice(first_row, first_row + len(tokens)), slice(first_slot, first_slot + len(jobs))
        buffers.hidden[rows], buffers.embedded[rows], buffers.masked[rows] = state.hidden, state.embedded, masked
        buffers.level[slots], buffers.summary[slots] = state.gate.level, state.gate.summary
        buffers.threshold[slots], buffers.ceiling[slots] = threshold.view(torch.float64), ceiling
        buffers.step[slots], buffers.reason[slots] = 0, GO_ON
        for a in admitted:
            self._sequences.append(LiveSequence(a.ticket, a.job, a.ceiling, first_row))
            first_row += len(a.job.tokens)

    def _launch(self, overdue: frozenset[Ticket]) -> Launched | None:
        if self._bucket is None:
            return None
        n = len(self._sequences)
        self._buffers.late[:n] = self._sent(one.ticket in overdue for one in self._sequences)[0] if overdue else False
        self._passes(self._buffers, self._bucket)
        for one in self._sequences:
            one.n_launched += 1
        (level, reason), done = to_host(self._buffers.level[:n], self._buffers.reason[:n])
        return Launched(list(self._sequences), level, reason, done)

    def _collect(self, chosen: dict[Ticket, list[Choice]]) -> tuple[dict[Ticket, Reading], set[Ticket]]:
        """What the pass before this one came to, with the choices of those whose last it was; and who else halted."""
        told: dict[Ticket, Reading] = {}
        halted: set[Ticket] = set()
        if self._launched is None:
            return told, halted
        sequences, level, reason, _ = self._launched  # which is done by now
        present = {one.ticket for one in self._sequences}  # the others were dropped
        for one, at, code in zip(sequences, level.tolist(), reason.tolist(), strict=True):
            if one.ticket in chosen or (one.ticket in present and code == GO_ON):
                told[one.ticket] = Reading(at, REASONS[code], chosen.get(one.ticket, []), [])
            elif one.ticket in present:
                halted.add(one.ticket)
        return told, halted

    def _decode(self, ended: list[LiveSequence]) -> None:
        if not ended:
            return
        assert self._bucket is not None
        (rows,) = self._sent(one.first_row + row for one in ended for row in one.due_rows)
        hidden = self._buffers.hidden[: self._bucket.n_rows]
        decoded = Decoded.of(self._model, hidden, self._bucket, rows, max(one.job.top_k for one in ended))
        on_host, done = to_host(*decoded)
        self._decoding = Decoding(ended, Decoded(*on_host), done)

    def _sent(self, *values: Iterable[int]) -> tuple[Tensor, ...]:
        """Each as int64, all in one copy. (`fromiter` takes a sixth of the time of `torch.tensor`.)"""
        arrays = [np.fromiter(some, np.int64) for some in values]
        sent = to_device(torch.from_numpy(np.concatenate(arrays)), self._model.device)
        return sent.split([len(some) for some in arrays])

    def _collect_decoded(self) -> dict[Ticket, list[Choice]]:
        if self._decoding is None:
            return {}
        ended, decoded, done = self._decoding
        self._decoding = None
        done()
        rows = (row for one in ended for row in one.due_rows)
        choices = iter(decoded.choices(rows, (one.job.top_k for one in ended for _ in one.due_rows)))
        return {one.ticket: list(islice(choices, len(one.due_rows))) for one in ended}


def to_host(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Copies that are there once the second value has been called."""
    if not tensors[0].is_cuda:
        return tuple(tensor.clone() for tensor in tensors), lambda: None
    copies = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps: the next pass is under way, there is time
    copied.record()
    return copies, copied.synchronize


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Streams and events are those of the current device, which every thread has to choose for itself."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
