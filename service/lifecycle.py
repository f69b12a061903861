"""Where a server stands between start and end, and what it serves: shared by all transports.

loading -> ready -> draining
    └──> failed <┘
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Literal, Protocol

from service.denoiser import Denoiser
from service.errors import DRAINING, RefusalReason, Unavailable

State = Literal["loading", "ready", "draining", "failed"]

REFUSALS: dict[State, tuple[str, RefusalReason]] = {
    "loading": ("the model is still loading", "loading"),
    "draining": (DRAINING, "draining"),
    "failed": ("the engine has failed", "failed"),
}


class Drains(Protocol):
    """An engine, or the way to one."""

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, finish what there is, and fail what is left after the grace period."""


class Lifecycle:
    def __init__(self) -> None:
        self._denoiser: Denoiser | None = None
        self._leaving: list[Denoiser] = []  # some texts may still be on their way from these to their engines
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

    def open(self, denoiser: Denoiser) -> None:
        """Loaded and warmed: take requests, from now on with this one."""
        if self._denoiser is not None:
            self._leaving.append(self._denoiser)
        self._denoiser = denoiser

    async def handed_over(self) -> None:
        """Returns once nothing comes any more to the engines of the denoisers before this one."""
        for denoiser in tuple(self._leaving):
            await denoiser.handed_in()
            if denoiser in self._leaving:
                self._leaving.remove(denoiser)

    async def drain(self, grace_seconds: float, *engines: Drains) -> None:
        """Turn new requests away, and give these engines the grace period to finish those accepted."""
        self._draining = True
        ends_at = time.monotonic() + grace_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):  # an engine knows nothing of texts that are being tokenised
                for denoiser in filter(None, (*self._leaving, self._denoiser)):
                    await denoiser.handed_in()
        left = max(0.0, ends_at - time.monotonic())
        await asyncio.gather(*(engine.drain(left) for engine in engines))
