"""The figures of an evaluation, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One setting at one mask ratio. Intervals are half of the 95 % interval; None is what was not measured."""

    kind: str
    setting: float  # depth, threshold, passes, share, budget or rounds
    mask_ratio: float
    exact_match: float
    interval: float  # of exact_match
    bits: float
    passes: float
    flops_per_token: float
    depth: int | None = None  # passes of one round; the depth a table has chosen
    run_2: float | None = None
    run_2_interval: float | None = None
    run_3: float | None = None
    run_3_interval: float | None = None
    run_4: float | None = None
    run_4_interval: float | None = None
    bleu: float | None = None
    bleu_interval: float | None = None
    lm_bits: float | None = None
    lm_bits_interval: float | None = None
    lm_excess_bits: float | None = None
    lm_excess_bits_interval: float | None = None
    bits_interval: float | None = None
    whole: float | None = None
    whole_interval: float | None = None

    @property
    def label(self) -> str:
        return f"{self.kind} {self.setting:g}"

    @property
    def key(self) -> str:
        """Tells the rows of one evaluation apart."""
        return f"{self.kind}:{self.setting:g}@{self.mask_ratio:g}"


@dataclass(frozen=True)
class Comparison:
    """One setting against one lookup, within one mask ratio, on the same segments.

    At equal passes: `difference` in exact match, positive where the setting is better. At equal exact match:
    `saved` passes, positive where the setting needs fewer; where the lookup is never as good, its deepest setting
    stands for it, so that `saved` is a lower bound, and `unreached` is the share of bootstrap samples where so.
    """

    mask_ratio: float
    kind: str  # "gate" or "settle-gate"
    setting: float
    against: str
    best: bool  # of the lookups, the best at these passes on validation text, or the only one
    passes: float
    against_passes: float  # smaller where the lookup has nothing to spend more on
    exact_match: float
    against_exact_match: float
    difference: float
    interval: float  # half of the paired 95 % interval
    flops_per_token: float
    against_flops_per_token: float
    saved: float
    saved_low: float
    saved_high: float
    unreached: float


@dataclass(frozen=True)
class LevelReading:
    """Means over the segments of one mask ratio, in passes."""

    mask_ratio: float
    after: int  # passes made
    said: float  # left, by the level
    left: float  # in truth: until the guesses are those of the deepest run, and stay so
    off: float  # how far one is from the other
    correlation: float | None  # None where one of both is the same everywhere
