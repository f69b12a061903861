"""Who runs in the next tick. Pure logic: no torch, no clock of its own, no futures.

    JobQueue.join -> plan: admit what fits -> one pass over all live -> commit: depths, results

A tick advances every live sequence by one pass. Sequences join and leave at every tick, so nobody waits
for another's depth. Admission is first come first served within a budget of packed tokens. If the first of the
queue does not fit, a later one that does may go before it, but only so often, so that nobody starves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

from service.engine.budget import TickBudget
from service.engine.pace import Pace
from service.engine.queue import BoundedQueue, Place
from service.engine.types import Admission, Choice, HaltReason, Job, Outcome, Plan, Result, Ticket

ANSWER_SECONDS = 0.005
"""From the end of a tick to the caller: to assemble, write and send an answer."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of a scheduler and its queue. `shed_min_steps` is the floor of shedding by depth; None: never shed."""

    token_budget: int  # packed tokens of one tick
    max_live: int  # sequences of one tick
    max_waiting: int  # requests
    max_waiting_tokens: int
    max_bypass: int = 8  # how often the head of the queue may be passed
    shed_min_steps: int | None = None


@dataclass(eq=False)
class Entry:
    """A job from submission to its end."""

    ticket: Ticket
    job: Job
    submitted: float  # seconds
    admitted: float = 0.0
    ceiling: int = 0  # most passes it may make: the job's max_steps, or fewer when shedding
    bypassed: int = 0
    begun_anew: bool = False  # after a shortage of memory
    levels: list[float] = field(default_factory=list)  # after each pass
    chosen: dict[int, tuple[int, Choice]] = field(default_factory=dict)  # row -> pass, choice
    decode_seconds: float = 0.0

    @property
    def n_tokens(self) -> int:
        return len(self.job.tokens)

    @cached_property
    def n_due(self) -> int:
        """Rows that will have been decoded when it ends."""
        return self.n_tokens if self.job.decode_all else sum(self.job.masked)

    @property
    def n_due_soon(self) -> int:
        """Rows of it that this tick and the next are certain to decode."""
        if self.job.stream:
            return 2 * self.n_due
        return self.n_due if self.ceiling - len(self.levels) <= 2 else 0

    def is_overdue(self, now: float) -> bool:
        return self.job.deadline is not None and now >= self.job.deadline


class JobQueue(BoundedQueue[Entry]):
    """Jobs that wait, in order of arrival. Several schedulers may admit from one queue; tickets are unique in it."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits.max_waiting, limits.max_waiting_tokens)
        self._token_budget = limits.token_budget
        self._tickets = count(1)

    def join(self, job: Job, place: Place, now: float) -> Ticket:
        """Queue a job in its reserved place. Raises `ResourceExhausted` when its tokens do not fit in the queue,
        `ValueError` when they would not fit in any tick.
        """
        if len(job.tokens) > self._token_budget:
            raise ValueError(f"the job has {len(job.tokens)} tokens: want at most token_budget = {self._token_budget}")
        entry = Entry(next(self._tickets), job, submitted=now)
        self.put(entry, place)
        return entry.ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a job out of the queue; false if it is not there."""
        return any(self.remove(entry) for entry in self if entry.ticket == ticket)


class Scheduler:
    """Who is live in one batch. Admits from a queue of its own, or from one that other schedulers share."""

    def __init__(self, limits: SchedulerLimits, queue: JobQueue | None = None) -> None:
        self._limits = limits
        self.budget = TickBudget(limits.token_budget)
        self.queue = JobQueue(limits) if queue is None else queue
        self._live: dict[Ticket, Entry] = {}  # in order of admission, which is the backend's order
        self._left: set[Ticket] = set()  # live sequences whose caller is gone
        self._passing, self._decoding = Pace(), Pace()  # seconds by packed tokens, and by decoded rows

    @property
    def n_live(self) -> int:
        return len(self._live)

    def depth(self, ticket: Ticket) -> int:
        """Passes that a live sequence has made; 0 for any other."""
        return len(self._live[ticket].levels) if ticket in self._live else 0

    @property
    def has_begun_anew(self) -> bool:
        """Whether anything live has lost passes to a shortage of memory."""
        return any(entry.begun_anew for entry in self._live.values())

    @property
    def live_tokens(self) -> int:
        return sum(entry.n_tokens for entry in self._live.values())

    @property
    def idle(self) -> bool:
        return not self._live and self.queue.n_queued == 0

    def cancel(self, ticket: Ticket) -> None:
        """The caller left: out of the queue at once, out of the live batch with the next plan."""
        if ticket in self._live:
            self._left.add(ticket)
        else:
            self.queue.withdraw(ticket)

    def plan(self, now: float, share: float = math.inf, ticks_late: int = 0) -> Plan:
        """What the next tick does. Everything in it is decided here; the backend only executes.

        A sequence that could not make another pass in time stops after this one, so that its answer is there before
        its deadline; answers come `ticks_late` ticks later than their passes. `share` is how many packed tokens are
        enough for this batch while others can take what is left in the queue.
        """
        self.budget.grow(now)
        dropped = tuple(self._left)
        for ticket in dropped:
            del self._live[ticket]
        self._left.clear()
        expired = [entry for entry in self.queue if entry.is_overdue(now)]
        for entry in expired:
            self.queue.remove(entry)
        admitted = self._admit(now, share)
        return Plan(
            admitted=tuple(Admission(entry.ticket, entry.job, entry.ceiling) for entry in admitted),
            dropped=dropped,
            overdue=self._overdue(now, ticks_late),
            expired=tuple(entry.ticket for entry in expired),
            live=tuple(self._live),
            n_tokens=self.live_tokens,
            made_at=now,
        )

    def commit(self, plan: Plan, outcome: Outcome, now: float) -> list[tuple[Ticket, Result]]:
        """Record one pass of every sequence in the outcome. Returns the results of those that stop."""
        self.budget.worked(plan.n_tokens)
        self._passing.took(plan.n_tokens, now - plan.made_at - outcome.decode_seconds)
        self._decoding.took(outcome.n_decoded, outcome.decode_seconds)
        finished = []
        for ticket, reading in outcome.readings.items():
            if ticket not in self._live:
                continue  # dropped while its pass was computed
            entry = self._live[ticket]
            entry.levels.append(reading.level)
            step = len(entry.levels)
            entry.chosen.update((choice.row, (step, choice)) for choice in reading.chosen)
            if reading.chosen or reading.guesses:
                entry.decode_seconds += outcome.decode_seconds
            if reading.reason is not None:
                del self._live[ticket]
                self._left.discard(ticket)
                finished.append((ticket, _result(entry, reading.reason, now)))
        return finished

    def lose_live(self) -> tuple[Ticket, ...]:
        """The tick broke and the backend forgot the live batch; the queue stays."""
        lost = tuple(self._live)
        self._live.clear()
        self._left.clear()
        return lost

    def start_over(self) -> None:
        """There was no memory for the tick: what was live goes back to the head of the queue and begins anew. It
        will get the same answer.
        """
        again = [entry for ticket, entry in self._live.items() if ticket not in self._left]
        for entry in again:
            entry.levels, entry.chosen, entry.decode_seconds = [], {}, 0.0
            entry.begun_anew = True
        self.queue.put_back(again)
        self._live.clear()
        self._left.clear()

    def drop_all(self) -> tuple[Ticket, ...]:
        """Empty the queue now and the live batch with the next plan."""
        self._left.update(self._live)
        waiting = list(self.queue)
        for entry in waiting:
            self.queue.remove(entry)
        return (*self._live, *(entry.ticket for entry in waiting))

    def _overdue(self, now: float, ticks_late: int) -> frozenset[Ticket]:
        """Live sequences that would be answered too late if they made one more pass after this one.

        By then two more passes are made, and these rows decoded: of sequences that are certain to end, of those that
        are overdue, and of those whose deadline is no later than that of the sequence in question. So sequences are
        judged from the latest deadline to the nearest.
        """
        timed = [entry for entry in self._live.values() if entry.job.deadline is not None]
        if not timed:
            return frozenset()
        passed = now + (2 + ticks_late) * self._passing.expected(self.live_tokens)
        rows = sum(entry.n_due_soon for entry in self._live.values())
        rows += sum(entry.n_due for entry in timed if not entry.n_due_soon)
        overdue = set()
        for entry in sorted(timed, key=lambda entry: entry.job.deadline or 0.0, reverse=True):
            if entry.is_overdue(passed + self._decoding.expected(rows) + ANSWER_SECONDS):
                overdue.add(entry.ticket)
            elif not entry.n_due_soon:
                rows -= entry.n_due
        return frozenset(overdue)

    def _admit(self, now: float, share: float) -> list[Entry]:
        admitted: list[Entry] = []
        used = self.live_tokens
        head: Entry | None = None  # the first that did not fit
        for entry in self.queue:
            if len(self._live) >= self._limits.max_live or used >= share:
                break
            if entry.n_tokens > self.budget.tokens:
                continue  # it waits for a batch with more memory
            if used + entry.n_tokens > self.budget.tokens:
                head = head or entry
            elif head is None or head.bypassed < self._limits.max_bypass:
                if head is not None:
                    head.bypassed += 1
                used += entry.n_tokens
                entry.admitted = now
                self._live[entry.ticket] = entry
                admitted.append(entry)
            else:
                break
        for entry in admitted:
            self.queue.remove(entry)
        for entry in admitted:
            entry.ceiling = entry.ceiling or self._ceiling(entry.job)
        return admitted

    def _ceiling(self, job: Job) -> int:
        """Under load, fewer passes: the fuller the queue, the nearer to the floor."""
        if self._limits.shed_min_steps is None:
            return job.max_steps
        fill = len(self.queue) / self._limits.max_waiting
        floor = min(job.max_steps, self._limits.shed_min_steps)
        return max(floor, round(job.max_steps - fill * (job.max_steps - floor)))


def _result(entry: Entry, reason: HaltReason, now: float) -> Result:
    tokens = list(entry.job.tokens)
    for row, (_, choice) in entry.chosen.items():
        tokens[row] = choice.token
    in_order = [entry.chosen[row] for row in sorted(entry.chosen)]
    return Result(
        tokens=tokens,
        rows=sorted(entry.chosen),
        probabilities=[choice.probability for _, choice in in_order],
        fixed_at=[step for step, _ in in_order],
        candidates=[choice.candidates for _, choice in in_order],
        steps=len(entry.levels),
        levels=entry.levels,
        reason=reason,
        max_steps=entry.ceiling,
        queue_seconds=entry.admitted - entry.submitted,
        compute_seconds=now - entry.admitted,
        decode_seconds=entry.decode_seconds,
    )
