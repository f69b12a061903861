"""The release of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """`0` for a checkout that is not installed."""
    try:
        return version("rdt")
    except PackageNotFoundError:
        return "0"
