"""Asks without a pause while somebody restarts the server, and counts what becomes of every request.

An accepted request has to be answered. One that is refused (503, or nobody listens) is sent again. A connection
that breaks is forgiven only to a request sent after the first refusal: by then the server accepts none.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import httpx
from place import HEADERS, SERVER, fail

CALLERS = 12
LIMIT_SECONDS = 150.0
PAUSE_SECONDS = 0.2
ANSWERS_AFTER = 200
"""So many answers from the new process are enough."""

REQUEST = {"text": " ".join(["The [MASK] fox jumps over the [MASK] dog."] * 4), "max_steps": 20, "threshold": 0}


class Load:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_refusal: float | None = None
        self.answers_after = self.answers_across = 0
        self.end = time.monotonic() + LIMIT_SECONDS

    @property
    def over(self) -> bool:
        return self.answers_after >= ANSWERS_AFTER or time.monotonic() > self.end

    async def caller(self, client: httpx.AsyncClient) -> None:
        while not self.over:
            await self.request(client)

    async def request(self, client: httpx.AsyncClient) -> None:
        """One request, as often as it takes."""
        while time.monotonic() < self.end:
            began = time.monotonic()
            outcome = await send(client)
            refused_before = self.first_refusal is not None and began >= self.first_refusal
            if outcome == "broken" and not refused_before:
                outcome = "lost"
            self.counts[outcome] += 1
            if outcome == "answered":
                self.answers_after += refused_before
                self.answers_across += self.first_refusal is not None and not refused_before
                return
            if outcome == "lost":
                return
            if self.first_refusal is None:
                self.first_refusal = time.monotonic()
            await asyncio.sleep(PAUSE_SECONDS)
        self.counts["never answered"] += 1


async def send(client: httpx.AsyncClient) -> str:
    try:
        response = await client.post("/denoise", json=REQUEST)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return "not connected"
    except httpx.TransportError:
        return "broken"
    return {200: "answered", 503: "refused"}.get(response.status_code, "lost")


async def main() -> None:
    load = Load()
    # Not kept: the server may close an idle connection while a request is on its way.
    one_each = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=SERVER, headers=HEADERS, timeout=60, limits=one_each) as client:
        await asyncio.gather(*(load.caller(client) for _ in range(CALLERS)))
    ends = ("answered", "refused", "not connected", "broken", "lost")
    shown = ", ".join(f"{load.counts[end]} {end}" for end in ends)
    shown += f"; {load.answers_across} were answered while others were refused, {load.answers_after} after that"
    if load.counts["lost"] or load.counts["never answered"] or load.answers_after < ANSWERS_AFTER:
        fail(f"{shown}, {load.counts['never answered']} never answered")
    print(shown)


if __name__ == "__main__":
    asyncio.run(main())
