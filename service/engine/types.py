"""What goes into the engine, through it, and out of it, as plain values without torch.

L: tokens of the sequence   M: rows decoded   S: passes made   N: live sequences

    Job -> Scheduler -> Plan -> Backend -> Outcome -> Scheduler -> Result
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

# The words of `rdt_core`, written again because importing them would import torch into every client.
Halting = Literal["gate", "settle"]
HaltReason = Literal["gate", "max_steps", "deadline"]


@dataclass(frozen=True)
class Job:
    """One sequence to restore, `[CLS]` and `[SEP]` included."""

    tokens: list[int]  # (L,)
    masked: list[bool]  # (L,)
    max_steps: int
    threshold: float
    halting: Halting
    top_k: int = 0
    decode_all: bool = False
    deadline: float | None = None  # on the engine's clock, in seconds
    stream: bool = False  # show the best guesses after every pass

    @property
    def read_every_pass(self) -> bool:
        """What a pass decodes is needed before the next pass: to be shown, or to be fed back in."""
        return self.stream or self.halting == "settle"


@dataclass(frozen=True)
class Result:
    """One sequence restored, and what it took."""

    tokens: list[int]  # (L,) the job's tokens with the decoded ones in place
    rows: list[int]  # (M,) which positions were decoded, in order
    probabilities: list[float]  # (M,) of each chosen token
    fixed_at: list[int]  # (M,) the pass after which each was chosen
    candidates: list[list[tuple[int, float]]]  # (M, top_k) (token, probability), most likely first
    steps: int
    levels: list[float]  # (S,) the level after each pass
    reason: HaltReason
    max_steps: int  # the passes it was allowed: the job's, or fewer under load
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    decode_seconds: float = 0.0  # part of compute_seconds: decoding, together with the tick's other rows


Ticket = int  # identifies a job from submission to its end


@dataclass(frozen=True)
class Admission:
    """A newcomer to the live batch. `ceiling` is the most passes it may make."""

    ticket: Ticket
    job: Job
    ceiling: int


@dataclass(frozen=True)
class Plan:
    """What one tick does: drop, admit, then one pass over `live`, the batch in its new order."""

    admitted: tuple[Admission, ...] = ()
    dropped: tuple[Ticket, ...] = ()  # live until now, caller gone: they leave undecoded
    overdue: frozenset[Ticket] = frozenset()  # live, out of time: answered after this pass, whatever their level
    expired: tuple[Ticket, ...] = ()  # waited past their deadline: never run
    live: tuple[Ticket, ...] = ()  # (N,) newcomers last
    n_tokens: int = 0
    made_at: float = 0.0  # on the engine's clock, in seconds

    @property
    def empty(self) -> bool:
        """Nothing for a backend to do."""
        return not self.live and not self.dropped


class Choice(NamedTuple):
    """A decoded row: the token written there, how probable, and the candidates asked for, itself first."""

    row: int
    token: int
    probability: float
    candidates: list[tuple[int, float]]


@dataclass(frozen=True)
class Reading:
    """One sequence after one pass. `reason` is None as long as it goes on."""

    level: float
    reason: HaltReason | None
    chosen: list[Choice]  # rows fixed by this pass
    guesses: list[Choice]  # open rows of a streamed job: what would be written now


@dataclass(frozen=True)
class Outcome:
    """What one tick did. From a backend with lookahead: what is known by now of passes launched in earlier ticks."""

    readings: dict[Ticket, Reading]
    n_decoded: int  # rows that went through the vocabulary
    decode_seconds: float = 0.0  # what that took
