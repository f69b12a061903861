"""The state of a server from start to end, and what it serves: shared by all transports.

loading ──> ready <──> failed

and from each of them to draining, from which nothing leads back.
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
    """An engine, or the connection to one."""

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, finish what there is, and fail what is left after the grace period."""


class Lifecycle:
    def __init__(self) -> None:
        self._denoiser: Denoiser | None = None
        self._leaving: list[Denoiser] = []  # replaced ones, from which texts may not have reached their engine yet
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
        """What serves requests now; ask anew for each request. Raises `Unavailable` unless ready."""
        state = self.state
        if self._denoiser is None or state != "ready":
            raise Unavailable(*REFUSALS[state])
        return self._denoiser

    def check(self) -> None:
        """Raises `Unavailable` unless ready."""
        _ = self.denoiser

    def open(self, denoiser: Denoiser) -> None:
        """Take requests from now on, and with this denoiser."""
        if self._denoiser is not None:
            self._leaving.append(self._denoiser)
        self._denoiser = denoiser

    async def handed_over(self) -> None:
        """Returns once replaced denoisers send nothing more to their engines."""
        for denoiser in tuple(self._leaving):
            await denoiser.handed_in()
            if denoiser in self._leaving:
                self._leaving.remove(denoiser)

    async def drain(self, grace_seconds: float, *engines: Drains) -> None:
        """Refuse new requests, and give these engines the grace period to finish accepted ones."""
        self._draining = True
        ends_at = time.monotonic() + grace_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):  # engines do not know of texts that are still being tokenised
                for denoiser in filter(None, (*self._leaving, self._denoiser)):
                    await denoiser.handed_in()
        left = max(0.0, ends_at - time.monotonic())
        await asyncio.gather(*(engine.drain(left) for engine in engines))
