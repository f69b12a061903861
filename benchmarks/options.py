"""Types of numbers for argparse: an error names the option, the value and the range."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TypeVar

T = TypeVar("T", int, float)


def natural(text: str) -> int:
    """A whole number >= 0."""
    return _within(text, int, 0, "a whole number >= 0")


def count(text: str) -> int:
    """A whole number >= 1."""
    return _within(text, int, 1, "a whole number >= 1")


def amount(text: str) -> float:
    """A finite number >= 0."""
    return _within(text, float, 0, "a number >= 0")


def positive(text: str) -> float:
    """A finite number > 0."""
    return _within(text, float, math.ulp(0), "a number > 0")


def share(text: str) -> float:
    """A number > 0, at most 1."""
    return _within(text, float, math.ulp(0), "a number > 0 and <= 1", highest=1)


def _within(text: str, kind: type[T], lowest: float, wanted: str, highest: float = sys.float_info.max) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text!r}: want {wanted}")
    return value
