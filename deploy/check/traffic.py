"""Makes everything happen that a dashboard shows, for a quarter of a minute, and sees Prometheus count it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import Any

import httpx
from place import HEADERS, SERVER, eventually, fail, value

SECONDS = 15.0
EASY = "The album was [MASK] in 2004 and received positive [MASK] from critics."
LONG = " ".join(["The [MASK] fox jumps over the [MASK] dog near the river."] * 8)
KINDS: list[dict[str, Any]] = [
    {"text": EASY},
    {"text": EASY, "top_k": 5, "restore": "all"},
    {"text": LONG},
    {"text": EASY, "max_steps": 3, "threshold": 0},
    {"text": EASY, "max_steps": 20, "threshold": 0.3},
    {"text": LONG, "max_steps": 100, "threshold": 0, "timeout_ms": 150},
    {"text": ""},
]
FLOODS: list[dict[str, Any]] = [
    {"text": "A [MASK].", "max_steps": 100, "threshold": 0, "timeout_ms": 2000},
    {"text": LONG, "max_steps": 100, "threshold": 0, "timeout_ms": 2000},
]
OK, REFUSED = 'sum(rdt_requests_total{outcome="ok"})', "sum(rdt_refused_total)"


async def main() -> None:
    before = {expression: so_far(expression) for expression in (OK, REFUSED)}
    outcomes: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=SERVER, headers=HEADERS, timeout=60) as client:
        end = time.monotonic() + SECONDS
        await asyncio.gather(*(ask_until(client, end, fields, outcomes) for fields in KINDS))
        for fields in FLOODS:
            await flood(client, fields, outcomes)
    for name in ("gate", "max_steps", "deadline", "status 422", "refused"):
        if not outcomes[name]:
            fail(f"no request ended with {name}: {dict(outcomes)}")
    counted = {OK: outcomes["answered"], REFUSED: outcomes["refused"]}
    for expression, n in counted.items():
        if not eventually(lambda expression=expression, n=n: value(expression) - before[expression] >= n):
            fail(f"Prometheus has {expression} risen by {value(expression) - before[expression]:g}: want {n}")
    print(", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())) + "; Prometheus counted them")


def so_far(expression: str) -> float:
    """0 while Prometheus has seen nothing."""
    seen = value(expression)
    return 0.0 if math.isnan(seen) else seen


async def ask_until(client: httpx.AsyncClient, end: float, fields: dict[str, Any], outcomes: Counter[str]) -> None:
    while time.monotonic() < end:
        count(await client.post("/denoise", json=fields), outcomes)
        await asyncio.sleep(0.02)


async def flood(client: httpx.AsyncClient, fields: dict[str, Any], outcomes: Counter[str]) -> None:
    """More than the queue holds, at once."""
    batch = {"items": [fields] * 64}
    for response in await asyncio.gather(*(client.post("/denoise/batch", json=batch) for _ in range(8))):
        response.raise_for_status()
        for result in response.json()["results"]:
            problem = result.get("problem")
            if problem is None:
                outcomes["answered"] += 1
                outcomes[result["answer"]["halt_reason"]] += 1
            else:
                outcomes["refused" if problem["status"] == 429 else f"status {problem['status']}"] += 1


def count(response: httpx.Response, outcomes: Counter[str]) -> None:
    if response.status_code == 200:
        outcomes["answered"] += 1
        outcomes[response.json()["halt_reason"]] += 1
    else:
        outcomes["refused" if response.status_code == 429 else f"status {response.status_code}"] += 1


if __name__ == "__main__":
    asyncio.run(main())
