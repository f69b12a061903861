"""When to stop, and which tokens to settle: arithmetic shared by the reference loop and the engine.

Two ways to spend passes. With `gate`, the hidden state is refined until the sequence's level is below
the threshold, then every masked row is decoded once. With `settle`, text comes back gradually: after
each pass the rows whose token level is below the threshold are decoded and become visible to the next
pass, and at least so many of the surest as keep the pace to `max_steps`. Of neighbours the surer goes first
(compare Luxembourg et al., 2025, "Plan for Speed: Dilated Scheduling for Masked Diffusion Language Models").
"""

from __future__ import annotations

from typing import Literal

HaltReason = Literal["gate", "max_steps", "deadline"]


def halt_reason(
    *, level: float, threshold: float, step: int, max_steps: int, all_settled: bool, out_of_time: bool
) -> HaltReason | None:
    """Why a sequence stops after `step` passes, or None if it goes on.

    `all_settled` is always false with `gate`: there, nothing is decoded before the end.
    """
    if level < threshold and not (all_settled and step == max_steps):
        return "gate"
    if step >= max_steps:
        return "max_steps"
    if all_settled:
        return "gate"
    return "deadline" if out_of_time else None


def due(n_masked: int, step: int, max_steps: int) -> int:
    """How many of `n_masked` rows must be settled after `step` of `max_steps` passes: `ceil(n x step / max)`."""
    return -(-n_masked * step // max_steps)
