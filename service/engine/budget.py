"""How many packed tokens one tick may have: as many as allowed, and fewer once memory has run out.

If memory runs out in a tick larger than any computed before, half of that tick is the limit from then on. If as many
tokens have been computed before, something else holds the memory: the tick is tried again, and the budget is halved
only if that fails too. It is doubled again after a while without a shortage.
"""

from __future__ import annotations

import math

from service.errors import MEMORY_RETRY_SECONDS

GROWING_SECONDS = float(MEMORY_RETRY_SECONDS)
"""How long after the last shortage of memory the budget is doubled again."""


class TickBudget:
    """`tokens` is the budget, of one batch on one device."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.short = False
        """Whether there was no memory for the last tick that was tried."""
        self._full = tokens  # the largest that it may grow to
        self._largest = 0  # tokens of the largest tick that was computed
        self._short_at = -math.inf
        self._warm = False

    def worked(self, n_tokens: int) -> None:
        """A tick of `n_tokens` was computed."""
        self._largest = max(self._largest, n_tokens)
        self.short = False

    def warmed(self, alone: bool) -> None:
        """Warming is over. If nothing else held memory meanwhile (`alone`), the budget never grows beyond this."""
        self._warm = True
        if alone:
            self._full = self.tokens

    def shrink(self, n_tokens: int, now: float, again: bool = False) -> None:
        """There was no memory for a tick of `n_tokens`; `again`: some of its jobs have met a shortage before."""
        if n_tokens > self._largest:
            self.tokens = min(self.tokens, n_tokens) // 2
            if self._warm:
                self._full = self.tokens
        elif self.short or again:
            self.tokens //= 2
        self.short, self._short_at = True, now

    def grow(self, now: float) -> None:
        """Double the budget if the last shortage was long enough ago."""
        if now - self._short_at >= GROWING_SECONDS:
            self.tokens, self._short_at = min(self._full, 2 * self.tokens), now
