"""How many replicas there should be.

Serve's own measure, requests under way, says little here: an engine computes as many at once as fit in a tick, and that
depends on their lengths. Waiting requests show that there are too few replicas. A load that fewer could do shows that
there are too many.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

WAITING, LOAD = "waiting", "load"
"""What every replica reports: requests in its queue, and its load (0 idle, 1 all that it can do)."""


class Context(Protocol):
    """What the policy reads of Serve's `AutoscalingContext`."""

    @property
    def current_num_replicas(self) -> int: ...

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def running_replicas(self) -> Collection[Any]: ...

    @property
    def total_queued_requests(self) -> float | None: ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class WaitingPolicy:
    """Serve makes one and calls it several times a second; bounds and delays are Serve's to apply."""

    def __init__(self, target_waiting: float, target_load: float) -> None:
        self._target_waiting = target_waiting
        self._target_load = target_load

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The number wanted, and nothing to remember."""
        n_replicas = context.current_num_replicas
        reports = context.aggregated_metrics or {}
        loads = reports.get(LOAD, {})
        silent = n_replicas - sum(replica in loads for replica in context.running_replicas)
        if n_replicas in (0, silent):
            return context.target_num_replicas, {}
        waiting = (context.total_queued_requests or 0.0) + sum(reports.get(WAITING, {}).values())
        load = sum(loads.values()) + silent  # one that has not reported yet may be full
        return wanted(n_replicas, waiting, load, self._target_waiting, self._target_load), {}


def wanted(n_replicas: int, waiting: float, load: float, target_waiting: float, target_load: float) -> float:
    """So many that each has `target_waiting` requests waiting; but no fewer than the work of now (all that `load`
    replicas can do) needs at `target_load`. The load alone is no reason for more replicas than there are.
    """
    return max(waiting / target_waiting, min(n_replicas, load / target_load))
