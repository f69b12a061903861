"""Where the parts of a check find the server and Prometheus, and how they end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import httpx

SERVER = "http://service:8000"
GRPC = "service:50051"
PROMETHEUS = "http://prometheus:9090"
KEY = os.environ.get("RDT_API_KEY") or None
HEADERS = {} if KEY is None else {"Authorization": f"Bearer {KEY}"}

WAIT_SECONDS = 60.0


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1)


def query(expression: str) -> list[dict[str, Any]]:
    """The samples an expression has now. Ends the process when Prometheus cannot make sense of it."""
    answer = httpx.post(f"{PROMETHEUS}/api/v1/query", data={"query": expression}, timeout=10).json()
    if answer["status"] != "success":
        fail(f"{answer['error']}: {expression}")
    return list(answer["data"]["result"])


def value(expression: str) -> float:
    """The one sample of an expression; NaN while there is none."""
    samples = query(expression)
    return float(samples[0]["value"][1]) if samples else float("nan")


def eventually(holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True
