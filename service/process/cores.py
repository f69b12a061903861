"""How many cores this process may use: those of its container, not of the machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """The cores this process may run on, and no more than its CPU quota pays for (rounded down, at least one).

    More threads than the quota would all be stopped together whenever it is used up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroups)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroups: Path = CGROUPS) -> float | None:
    """The CPU quota of the control group, in cores, by version 2 or 1 of the interface; None: no quota."""
    try:
        quota, period = _words(cgroups / "cpu.max") or _words(
            cgroups / "cpu" / "cpu.cfs_quota_us", cgroups / "cpu" / "cpu.cfs_period_us"
        )
        return float(quota) / float(period) if float(quota) > 0 else None
    except ValueError:  # no such files, or `max`
        return None


def _words(*paths: Path) -> list[str]:
    try:
        return [word for path in paths for word in path.read_text(encoding="ascii").split()]
    except OSError:
        return []
