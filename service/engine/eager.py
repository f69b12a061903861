"""Packed passes over sequences of any length at any depth, on a CPU or on CUDA, one kernel at a time.

T: packed tokens   N: live sequences   R: rows decoded   V: vocabulary

One mechanism serves both ways of halting. After a pass some rows are decoded: with `settle` those that
become text now, with `gate` none until the end, and in both every row still open of a sequence that stops.
Settled tokens replace their `[MASK]` in the embedded input. Sequences that stop are cut out of the batch. The
arithmetic is that of `rdt_core.inference`, for all sequences at once. What the host must know is read back
once, after the pass: who stops, and what was decoded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rdt_core.decoding import read_logits
from rdt_core.gate import GateState
from rdt_core.halting import surest_apart
from rdt_core.model import RDT, State
from rdt_core.packing import Packing, rows_of
from service.engine.batch_halting import GO_ON, REASONS, Terms, count, reasons_of, settled_level, settling_rows
from service.engine.memory import or_out_of_memory
from service.engine.types import Admission, Choice, Job, Outcome, Plan, Reading, Ticket


@dataclass(frozen=True)
class Batch:
    """The live sequences, packed in the order of `tickets`."""

    tickets: tuple[Ticket, ...]
    jobs: tuple[Job, ...]
    packing: Packing
    state: State
    asked: Tensor  # (T,) bool, rows that were masked in the request
    terms: Terms

    @property
    def settles(self) -> bool:
        """Whether any sequence in it settles."""
        return any(job.halting == "settle" for job in self.jobs)


class EagerBackend:
    """A `Backend` that runs each operation as it comes."""

    ticks_late = 0

    def __init__(self, model: RDT) -> None:
        self._model = model
        self._batch: Batch | None = None

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Of the sequences that have begun and go on."""
        return () if self._batch is None else self._batch.tickets

    def reset(self) -> None:
        self._batch = None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self, plan: Plan) -> Outcome:
        return or_out_of_memory(lambda: self._run(plan))

    @torch.inference_mode()
    def _run(self, plan: Plan) -> Outcome:
        batch = self._without(plan.dropped)
        if plan.admitted:
            newcomers = self._begin(plan.admitted)
            batch = newcomers if batch is None else _join(batch, newcomers)
        if batch is None:
            self._batch = None
            return Outcome({}, 0)
        assert batch.tickets == plan.live
        return self._advance(batch, plan.overdue)

    def _without(self, dropped: tuple[Ticket, ...]) -> Batch | None:
        if self._batch is None or not dropped:
            return self._batch
        gone = set(dropped)
        return _keep(self._batch, [i for i, ticket in enumerate(self._batch.tickets) if ticket not in gone])

    def _begin(self, admitted: tuple[Admission, ...]) -> Batch:
        """The prelude of all newcomers at once."""
        jobs = [admission.job for admission in admitted]
        device = self._model.device
        packing = Packing.of([len(job.tokens) for job in jobs], device)
        masked = torch.tensor([m for job in jobs for m in job.masked], device=device)
        tokens = torch.tensor([token for job in jobs for token in job.tokens], device=device)
        terms = Terms(
            threshold=torch.tensor([job.threshold for job in jobs], dtype=torch.float64, device=device),
            ceiling=torch.tensor([admission.ceiling for admission in admitted], device=device),
            step=torch.zeros(len(jobs), dtype=torch.int64, device=device),
            level=torch.ones(len(jobs), device=device),
            n_masked=torch.tensor([sum(job.masked) for job in jobs], device=device),
            settles=torch.tensor([job.halting == "settle" for job in jobs], device=device),
            decode_all=torch.tensor([job.decode_all for job in jobs], device=device),
            streams=torch.tensor([job.stream for job in jobs], device=device),
        )
        return Batch(
            tickets=tuple(admission.ticket for admission in admitted),
            jobs=tuple(jobs),
            packing=packing,
            state=self._model.begin(tokens, masked, packing),
            asked=masked,
            terms=terms,
        )

    def _advance(self, batch: Batch, overdue: frozenset[Ticket]) -> Outcome:
        """One pass; which rows settle and which sequences stop; the coda for both; those that stop leave the batch."""
        packing = batch.packing
        state = self._model(batch.state, packing, self._rows_needed(batch))
        terms = batch.terms._replace(step=batch.terms.step + 1)
        level, settling, all_settled = state.gate.level, torch.zeros_like(state.masked), None  # (N,), (T,) bool, (N,)
        if batch.settles:
            settling, level_if_settling = self._settle(state, packing, terms)
            level = torch.where(terms.settles, level_if_settling, level)
            all_settled = terms.settles & (count(state.masked & ~settling, packing) == 0)
        reason = reasons_of(
            level=level,
            threshold=terms.threshold,
            last=terms.step >= terms.ceiling,
            late=torch.tensor([ticket in overdue for ticket in batch.tickets], device=level.device),
            all_settled=all_settled,
        )  # (N,)
        reasons = reason.tolist()
        readings = [Reading(at, REASONS[code], [], []) for at, code in zip(level.tolist(), reasons, strict=True)]
        staying = [i for i, code in enumerate(reasons) if code == GO_ON]

        batch = replace(batch, state=state, terms=terms._replace(level=level))
        n_decoded, decode_seconds = 0, 0.0
        if len(staying) < len(reasons) or any(job.read_every_pass for job in batch.jobs):
            batch, n_decoded, decode_seconds = self._decode(batch, settling, reason != GO_ON, readings)
        self._batch = batch if len(staying) == len(reasons) else _keep(batch, staying)
        return Outcome(dict(zip(batch.tickets, readings, strict=True)), n_decoded, decode_seconds)

    def _decode(
        self, batch: Batch, settling: Tensor, stops: Tensor, readings: list[Reading]
    ) -> tuple[Batch, int, float]:
        """The coda of rows that settle `(T,)` bool, of sequences that stop `(N,)` bool, and of what is streamed.

        Adds choices and guesses to the readings. Returns the batch with the settled tokens written in, the number of
        decoded rows, and the seconds that decoding took.
        """
        state, packing, terms = batch.state, batch.packing, batch.terms
        stops = stops[packing.sequence_ids]  # (T,)
        read_all = stops & terms.decode_all[packing.sequence_ids] & ~(batch.asked & ~state.masked)
        fixed = settling | (state.masked & stops) | read_all
        shown = fixed | (state.masked & terms.streams[packing.sequence_ids])
        rows = shown.nonzero().squeeze(1)  # (R,)
        began = time.perf_counter()
        decoded = Decoded.of(self._model, state.hidden, packing, rows, max(job.top_k for job in batch.jobs))
        writes = fixed[rows]
        _hand_out(decoded, writes, batch, readings)
        decode_seconds = time.perf_counter() - began  # on CUDA it is the reading that waits for what was launched

        if batch.settles:
            state = self._model.settle(state, rows[writes], decoded.tokens[writes])
        return replace(batch, state=state), len(rows), decode_seconds

    def _rows_needed(self, batch: Batch) -> Tensor | None:
        """Rows `(R,)` that will be read after the next pass, None for all: of a sequence whose last pass it is, only
        those that are decoded.
        """
        may_go_on = batch.terms.step + 1 < batch.terms.ceiling  # (N,)
        whole = (may_go_on | batch.terms.decode_all)[batch.packing.sequence_ids]  # (T,)
        rows = (whole | batch.state.masked).nonzero().squeeze(1)
        return None if len(rows) == batch.packing.n_tokens else rows

    def _settle(self, state: State, packing: Packing, terms: Terms) -> tuple[Tensor, Tensor]:
        """Of sequences that settle: which rows settle now `(T,)` bool, and the level after that `(N,)`."""
        candidates = state.masked & terms.settles[packing.sequence_ids]  # (T,) bool
        has_choice = terms.step < terms.ceiling  # (N,): after the last pass every row settles
        choosing = candidates & has_choice[packing.sequence_ids]  # (T,) bool
        token_level, waits = self._token_levels(state, packing, choosing)  # (T,) each
        settling = settling_rows(candidates, token_level, waits, packing, terms)
        return settling, settled_level(token_level * (state.masked & ~settling), packing, terms)

    def _token_levels(self, state: State, packing: Packing, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Token levels `(T,)` of the `wanted` rows `(T,)` bool, 1 elsewhere, and which wait for a surer neighbour."""
        rows = wanted.nonzero().squeeze(1)  # (M,)
        token_level, waits = torch.ones(len(wanted), device=rows.device), torch.zeros_like(wanted)
        if len(rows) > 0:
            level = self._model.token_level(state.hidden, packing, rows)
            beside = (rows.diff() == 1) & (packing.sequence_ids[rows].diff() == 0)
            token_level.index_copy_(0, rows, level)
            waits.index_copy_(0, rows, ~surest_apart(level, beside))
        return token_level, waits


class Decoded(NamedTuple):
    """What the coda reads in `R` rows."""

    rows: Tensor  # (R,)
    tokens: Tensor  # (R,)
    probabilities: Tensor  # (R,)
    top_tokens: Tensor  # (R, K)
    top_probabilities: Tensor  # (R, K)

    @classmethod
    def of(cls, model: RDT, hidden: Tensor, packing: Packing, rows: Tensor, top_k: int) -> Decoded:
        if len(rows) == 0:
            none = torch.zeros(0, top_k, device=rows.device)
            return cls(rows, rows, none.sum(1), none.long(), none)
        return cls(rows, *read_logits(model.decode(hidden, packing, rows), top_k))

    def choices(self, rows: Iterable[int], top_k: Iterable[int]) -> list[Choice]:
        """As plain values. `rows` numbers each row within its own sequence; `top_k` is how many candidates it gets."""
        columns = (self.tokens, self.probabilities, self.top_tokens, self.top_probabilities)
        return [
            Choice(row, token, probability, list(zip(others[:k], shares[:k], strict=True)) if k else [])
            for row, k, token, probability, others, shares in zip(
                rows, top_k, *(column.tolist() for column in columns), strict=True
            )
        ]


def _hand_out(decoded: Decoded, writes: Tensor, batch: Batch, readings: list[Reading]) -> None:
    """Add each decoded row, as plain values, to the reading of its sequence."""
    owners = batch.packing.sequence_ids[decoded.rows].tolist()
    choices = decoded.choices(batch.packing.positions[decoded.rows].tolist(), (batch.jobs[i].top_k for i in owners))
    for i, written, choice in zip(owners, writes.tolist(), choices, strict=True):
        (readings[i].chosen if written else readings[i].guesses).append(choice)


def _keep(batch: Batch, sequences: list[int]) -> Batch | None:
    """The batch with only these sequences; None if there are none."""
    if not sequences:
        return None
    rows = rows_of(batch.packing, sequences)
    kept = torch.tensor(sequences, device=rows.device)
    return Batch(
        tickets=tuple(batch.tickets[i] for i in sequences),
        jobs=tuple(batch.jobs[i] for i in sequences),
        packing=Packing.of([batch.packing.lengths[i] for i in sequences], rows.device),
        state=State(
            hidden=batch.state.hidden[rows],
            embedded=batch.state.embedded[rows],
            masked=batch.state.masked[rows],
            gate=GateState(*(part[kept] for part in batch.state.gate)),
        ),
        asked=batch.asked[rows],
        terms=Terms(*(term[kept] for term in batch.terms)),
    )


def _join(live: Batch, newcomers: Batch) -> Batch:
    """Both batches as one, newcomers last."""
    device = live.asked.device

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b))

    return Batch(
        tickets=live.tickets + newcomers.tickets,
        jobs=live.jobs + newcomers.jobs,
        packing=Packing.of(live.packing.lengths + newcomers.packing.lengths, device),
        state=State(
            hidden=both(live.state.hidden, newcomers.state.hidden),
            embedded=both(live.state.embedded, newcomers.state.embedded),
            masked=both(live.state.masked, newcomers.state.masked),
            gate=GateState(*map(both, live.state.gate, newcomers.state.gate)),
        ),
        asked=both(live.asked, newcomers.asked),
        terms=Terms(*map(both, live.terms, newcomers.terms)),
    )
