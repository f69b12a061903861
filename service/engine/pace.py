"""How long work of a given amount takes here, learned from what it took."""

from __future__ import annotations


class Pace:
    """Remembers one duration for each order of magnitude (a power of 2). An amount takes in proportion to what is known
    of its own order, or of the nearest. A longer duration is believed at once, and forgotten by halves.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, float]] = {}  # order of magnitude -> amount, seconds

    def took(self, amount: int, seconds: float) -> None:
        """So much was done in so many seconds. No amount tells nothing."""
        if amount > 0:
            seconds = max(seconds, (self._of(amount.bit_length(), amount) + seconds) / 2)
            self._known[amount.bit_length()] = amount, seconds

    def expected(self, amount: int) -> float:
        """Seconds that so much will take; 0 for nothing, and as long as nothing is known."""
        order = amount.bit_length()
        return self._of(min(self._known, key=lambda known: (abs(known - order), known), default=order), amount)

    def _of(self, order: int, amount: int) -> float:
        known, seconds = self._known.get(order, (1, 0.0))
        return seconds * amount / known
