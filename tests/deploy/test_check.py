"""The check's own judgement: which broken connections it forgives, and which sample it waits for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from service.local import LocalDenoiser

CHECK = Path(__file__).parents[2] / "deploy" / "check"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a part of the check, which are scripts in one folder and no package."""
    monkeypatch.syspath_prepend(str(CHECK))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        del sys.modules[name]


def answering(*ends: int | Exception) -> httpx.AsyncClient:
    """A server that ends requests so, one after the other."""
    left = list(ends)

    def answer(_request: httpx.Request) -> httpx.Response:
        end = left.pop(0)
        if isinstance(end, Exception):
            raise end
        return httpx.Response(end)

    return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer))


BROKEN, DEAF = httpx.ReadError("reset"), httpx.ConnectError("nobody listens")


@pytest.mark.parametrize(
    ("ends", "counts", "after"),
    [
        ([200], {"answered": 1}, 0),
        ([503, DEAF, 200], {"refused": 1, "not connected": 1, "answered": 1}, 1),
        ([503, BROKEN, 200], {"refused": 1, "broken": 1, "answered": 1}, 1),
        ([BROKEN], {"lost": 1}, 0),
        ([500], {"lost": 1}, 0),
        ([503, 500], {"refused": 1, "lost": 1}, 0),
    ],
    ids=["answered", "sent again", "broken after a refusal", "broken before one", "failed", "failed after a refusal"],
)
async def test_a_request_is_followed_to_its_end(
    part: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    ends: list[int | Exception],
    counts: dict[str, int],
    after: int,
) -> None:
    module = part("load")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    load = module.Load()
    await load.request(answering(*ends))
    assert dict(load.counts) == counts
    assert load.answers_after == after


async def test_a_request_that_was_under_way_at_the_first_refusal_has_to_be_answered(
    part: Callable[[str], ModuleType],
) -> None:
    module = part("load")
    load = module.Load()

    def refuse_others_meanwhile(_request: httpx.Request) -> httpx.Response:
        load.first_refusal = float("inf")
        raise BROKEN

    client = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(refuse_others_meanwhile))
    await load.request(client)
    assert dict(load.counts) == {"lost": 1}


def test_the_variables_of_the_dashboard_are_filled_in(part: Callable[[str], ModuleType]) -> None:
    module = part("panels")
    (path,) = module.DASHBOARDS.glob("*.json")
    asked = [expression for _, expression in module.expressions_of(path)]
    assert len(asked) > 30
    assert not any("$" in expression.replace('"$1"', "") for expression in asked)


def test_the_script_is_bash_and_uses_every_part() -> None:
    script = CHECK.parent / "check.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert {path.name for path in CHECK.glob("*.py") if path.name not in text} == {"place.py"}


@pytest.mark.e2e
def test_with_the_bundled_model_everything_happens_that_is_waited_for(part: Callable[[str], ModuleType]) -> None:
    denoiser = LocalDenoiser(CHECK.parents[1] / "models" / "rdt-small" / "best_model.pt", "cpu")
    kinds = [kind for kind in part("traffic").KINDS if kind["text"] and "timeout_ms" not in kind]
    ends = [denoiser.denoise(kind["text"], **restore_options(kind)) for kind in kinds]
    assert {end.steps < end.max_steps for end in ends} == {True, False}, "by the gate, and by max_steps"


def restore_options(kind: dict[str, Any]) -> dict[str, Any]:
    return {name: kind[name] for name in ("max_steps", "threshold") if name in kind}


@pytest.mark.parametrize(("seen", "counts"), [(float("nan"), 0.0), (3.0, 3.0)])
def test_before_the_first_scrape_nothing_has_happened(
    part: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, seen: float, counts: float
) -> None:
    traffic = part("traffic")
    monkeypatch.setattr(traffic, "value", lambda _: seen)
    assert traffic.so_far("sum(rdt_refused_total)") == counts
