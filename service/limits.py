"""What this server accepts, given its model and its settings: the one place where ceilings are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import FieldProblem, ResourceExhausted

CHARACTERS_PER_TOKEN = 32
"""A text with more characters than this for every token of `max_seq_len` is refused without tokenising it.

English has about five; 32 leaves room for long words and wide gaps, and bounds the work of tokenising.
"""

MAX_TIMEOUT_MS = 3_600_000

ARRIVAL_SECONDS = 30.0
"""How long a request may take to arrive, on every transport, from its first byte to its last. A new connection to REST
may be silent for as long."""

MOST_BODIES = 64
"""So many bodies of the largest size may each transport hold at once, on their way in or of requests that wait for
their answer."""
FEW_BYTES = 65_536
"""A body that is no larger is taken all the same, so that a few callers who send much do not keep out all others."""


class Room:
    """Bytes of all bodies that a transport holds at a time, each of at most `max_bytes`. `whose` is for the refusal."""

    def __init__(self, max_bytes: int, whose: str) -> None:
        self._most = MOST_BODIES * max_bytes
        self._whose = whose
        self._held = 0

    def take(self, n_more: int, n_so_far: int) -> None:
        """More of a body, of which `n_so_far` bytes have come with these; to be given back also if it is refused.
        Raises `ResourceExhausted`.
        """
        self._held += n_more
        if n_so_far > FEW_BYTES and self._held > self._most:
            together = f"the {self._whose} under way have over {self._most} bytes"
            raise ResourceExhausted(f"{together}: try again later", "bodies")

    def give_back(self, n_bytes: int) -> None:
        self._held -= n_bytes


@dataclass(frozen=True)
class Limits:
    """Upper bounds, all inclusive. `max_seq_len` counts tokens, `[CLS]` and `[SEP]` included."""

    max_seq_len: int
    max_steps: int
    max_top_k: int
    max_batch_items: int
    max_timeout_ms: int = MAX_TIMEOUT_MS

    @property
    def max_characters(self) -> int:
        return CHARACTERS_PER_TOKEN * self.max_seq_len

    @property
    def shown(self) -> dict[str, int]:
        """All limits, as `GET /model` shows them."""
        lengths = {"max_seq_len": self.max_seq_len, "max_characters": self.max_characters}
        return {**lengths, "max_batch_items": self.max_batch_items, **self.ceilings}

    @property
    def ceilings(self) -> dict[str, int]:
        """The largest value of each bounded field."""
        return {"max_steps": self.max_steps, "top_k": self.max_top_k, "timeout_ms": self.max_timeout_ms}

    def above(self, fields: Mapping[str, object], wanted: Mapping[str, str]) -> list[FieldProblem]:
        """Problems of fields whose whole number is above its ceiling. The schema finds all others."""
        return [
            FieldProblem.of(name, value, wanted[name])
            for name, ceiling in self.ceilings.items()
            if type(value := fields.get(name)) is int and value > ceiling  # true is not a number
        ]
