"""How long a given amount of work takes, learned from durations so far."""

from __future__ import annotations


class Pace:
    """Remembers one duration for each order of magnitude (a power of 2). An amount is expected to take in proportion to
    the duration known for its own order, or for the nearest. A longer duration counts at once, a shorter one by half.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, float]] = {}  # order of magnitude -> amount, seconds

    def took(self, amount: int, seconds: float) -> None:
        """This amount was done in so many seconds; an amount of 0 is ignored."""
        if amount > 0:
            seconds = max(seconds, (self._of(amount.bit_length(), amount) + seconds) / 2)
            self._known[amount.bit_length()] = amount, seconds

    def expected(self, amount: int) -> float:
        """Seconds that this amount will take; 0 for an amount of 0, and while nothing is known."""
        order = amount.bit_length()
        return self._of(min(self._known, key=lambda known: (abs(known - order), known), default=order), amount)

    def _of(self, order: int, amount: int) -> float:
        known, seconds = self._known.get(order, (1, 0.0))
        return seconds * amount / known
