"""Where a server stands between start and end, and what it serves: shared by all transports.

loading -> ready -> draining
    └──> failed <┘
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Literal

from service.denoiser import Denoiser
from service.errors import RefusalReason, Unavailable

State = Literal["loading", "ready", "draining", "failed"]

REFUSALS: dict[State, tuple[str, RefusalReason]] = {
    "loading": ("the model is still loading", "loading"),
    "draining": ("the server is shutting down and takes no new work", "draining"),
    "failed": ("the engine has failed", "failed"),
}


class Lifecycle:
    def __init__(self) -> None:
        self._denoiser: Denoiser | None = None
        self._draining = False

    @property
    def state(self) -> State:
        if self._draining:
            return "draining"
        if self._denoiser is None:
            return "loading"
        return "ready" if self._denoiser.engine.ready else "failed"

    @property
    def denoiser(self) -> Denoiser:
        """What to serve a request with, now: ask for each anew. Raises `Unavailable` unless ready."""
        state = self.state
        if self._denoiser is None or state != "ready":
            raise Unavailable(*REFUSALS[state])
        return self._denoiser

    def check(self) -> None:
        """Raises `Unavailable` unless ready."""
        _ = self.denoiser

    def open(self, denoiser: Denoiser) -> Denoiser | None:
        """Loaded and warmed: take requests, from now on with this one. Returns the one before."""
        before, self._denoiser = self._denoiser, denoiser
        return before

    async def handed_over(self) -> None:
        """Returns once nobody takes the denoiser before this one any more. Here all callers are on one event loop."""

    async def drain(self, grace_seconds: float) -> None:
        """Turn new requests away, and give those accepted the grace period to finish."""
        self._draining = True
        if self._denoiser is None:
            return
        ends_at = time.monotonic() + grace_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._denoiser.handed_in()  # the engine knows nothing yet of texts that are being tokenised
        await self._denoiser.engine.drain(max(0.0, ends_at - time.monotonic()))
