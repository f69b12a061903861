"""Every expression of the dashboard has samples, and every rule is evaluated without an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
from place import PROMETHEUS, eventually, fail, query

DASHBOARDS = Path(__file__).parents[1] / "grafana" / "dashboards"
VARIABLES = {"$__rate_interval": "1m", "$job": "rdt", "$namespace": ".*", "$instance": ".+"}


def main() -> None:
    expressions = [pair for path in sorted(DASHBOARDS.glob("*.json")) for pair in expressions_of(path)]
    for title, expression in expressions:
        if not eventually(lambda expression=expression: has_samples(expression), 30):
            fail(f"panel {title!r} is empty: {expression}")
    groups = httpx.get(f"{PROMETHEUS}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        if not eventually(lambda rule=rule: rule["type"] == "alerting" or has_samples(rule["name"]), 30):
            fail(f"{rule['name']} has no samples")
        if rule["health"] != "ok":
            fail(f"{rule['name']}: {rule.get('lastError', rule['health'])}")
    n_alerts = sum(rule["type"] == "alerting" for rule in rules)
    print(f"{len(expressions)} expressions of panels, {len(rules) - n_alerts} recording rules, {n_alerts} alerts")


def expressions_of(path: Path) -> Iterator[tuple[str, str]]:
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, text in VARIABLES.items():
                expression = expression.replace(name, text)
            yield panel["title"], expression


def has_samples(expression: str) -> bool:
    return any(math.isfinite(float(sample["value"][1])) for sample in query(expression))


if __name__ == "__main__":
    main()
