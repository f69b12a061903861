"""How long work of a given amount takes here, learned from what it took."""

from __future__ import annotations

from itertools import pairwise


class Pace:
    """Remembers one duration for each order of magnitude (a power of two), and draws straight lines between them.

    Beyond the least and the most that is known it takes them for proportional. A longer duration is believed at once,
    and forgotten by halves.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, float]] = {}  # order of magnitude -> amount, seconds

    def took(self, amount: int, seconds: float) -> None:
        """So much was done in so many seconds. No amount tells nothing."""
        if amount > 0:
            _, before = self._known.get(amount.bit_length(), (0, 0.0))
            self._known[amount.bit_length()] = amount, max(seconds, (before + seconds) / 2)

    def expected(self, amount: int) -> float:
        """Seconds that so much will take; 0 for nothing, and as long as nothing is known."""
        if amount <= 0 or not self._known:
            return 0.0
        known = sorted(self._known.values())
        for (less, low), (more, high) in pairwise(known):
            if less <= amount <= more:
                return low + (high - low) * (amount - less) / (more - less)
        nearest, seconds = known[0] if amount < known[0][0] else known[-1]
        return seconds * amount / nearest
