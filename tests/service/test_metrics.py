"""The scrape itself: names, and that nobody can mint new series."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.errors import CODES
from tests.fakes import Service

NAMES = {
    "rdt_requests", "rdt_request_duration_seconds", "rdt_queue_duration_seconds", "rdt_steps_taken", "rdt_halts",
    "rdt_passes", "rdt_tokens", "rdt_live_requests", "rdt_waiting_requests", "rdt_refused", "rdt_model_info",
    "rdt_tick_duration_seconds", "rdt_tick_tokens", "rdt_decoded_rows",
}  # fmt: skip


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    families = list(text_string_to_metric_families(text))
    return {(s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples}


async def test_the_scrape_has_every_metric_and_no_other(service: Service) -> None:
    async with service.client() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {name for name in families if not name.endswith("_created")} == NAMES
    assert all(family.documentation for family in families.values())
    [model] = families["rdt_model_info"].samples
    assert model.labels["name"] == "tiny"


async def test_callers_cannot_mint_series(service: Service) -> None:
    bodies = [{"text": "a"}, {"text": ""}, {"text": "a " * 40}, {"text": "a", "halting": "zzz"}, {"zzz": 1}]
    async with service.client() as client:
        for body in bodies:
            await client.post("/denoise", json=body)
        await client.post("/denoise", content=b"{", headers={"Content-Type": "application/json"})
        before = series((await client.get("/metrics")).text)
        for number in range(20):
            await client.get(f"/nowhere/{number}")
            await client.post("/denoise", json={"text": "a", f"field{number}": number, "halting": f"h{number}"})
            await client.request(f"METHOD{number}", "/denoise")
        after = series((await client.get("/metrics")).text)
    assert after == before
    outcomes = {dict(labels)["outcome"] for name, labels in after if name == "rdt_requests_total"}
    assert outcomes == {"ok", "invalid_argument", "too_large", "malformed"}
    assert outcomes <= {"ok", *CODES}


async def test_failures_outside_the_use_case_are_counted_too(service: Service) -> None:
    async with service.client() as client:
        await client.post("/denoise", content=b"{", headers={"Content-Type": "application/json"})
        await client.post("/denoise", content=b"text")
    counted = [
        service.sample("rdt_requests_total", transport="rest", outcome=o) for o in ("malformed", "unsupported_format")
    ]
    assert counted == [1, 1]
