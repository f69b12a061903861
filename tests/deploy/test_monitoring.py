"""Rules, alerts and the dashboard name only what the server exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.errors import CODES
from service.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "rdt.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PROCESS = {  # on Linux only
    "process_cpu_seconds_total", "process_max_fds", "process_open_fds", "process_resident_memory_bytes",
    "process_start_time_seconds",
}  # fmt: skip

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDS, ALERTS = rules("rules.yml"), rules("alerts.yml")


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RECORDS + ALERTS)
    yield from (target["expr"] for panel in PANELS for target in panel["targets"])
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable)


def exported() -> set[str]:
    metrics = Metrics(time.monotonic)
    metrics.describe_model("tiny", "abc", "cpu", "fp32")
    families = metrics.registry.collect()
    return PROCESS | {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def test_every_metric_that_is_asked_for_exists() -> None:
    recorded = {rule["record"] for rule in RECORDS}
    for expression in expressions():
        names = set(re.findall(r"[\w:]*\b(?:rdt|process)_[\w:]+", expression))
        assert names or expression.startswith(("count(ALERTS", "up")), expression
        assert names <= exported() | recorded, names - exported() - recorded


def test_every_outcome_that_is_asked_for_exists() -> None:
    known = {"rdt_requests_total": {"ok", *CODES}, "rdt_model_reloads_total": {"swapped", "unchanged", "failed"}}
    for expression in expressions():
        for metric, outcome in re.findall(r'(\w+)\{[^}]*outcome="(\w+)"', expression):
            assert outcome in known[metric]


def test_every_bucket_that_is_asked_for_exists() -> None:
    samples = [sample for family in Metrics(time.monotonic).registry.collect() for sample in family.samples]
    bounds = {(sample.name, sample.labels.get("le")) for sample in samples}
    asked = {pair for expression in expressions() for pair in re.findall(r'(\w+)\{[^}]*le="([^"]+)"', expression)}
    assert asked
    assert asked <= bounds


@pytest.mark.parametrize(
    "alert", [alert for alert in ALERTS if "_rate5m{" in alert["expr"]], ids=lambda alert: alert["alert"]
)
def test_no_share_is_an_alarm_before_three_cases(alert: dict[str, Any]) -> None:
    _share, counted, cases = alert["expr"].rstrip().partition("and sum by (namespace, job) (increase(")
    assert counted
    assert cases.endswith("[5m])) > 2.5")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    notes = alert["annotations"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert notes["summary"]
    assert notes["description"]
    page, _, anchor = notes["runbook"].partition("#")
    assert anchor == alert["alert"].lower()
    assert f"### {alert['alert']}\n" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [alert["alert"] for alert in ALERTS])
def test_every_alert_is_seen_firing_and_not_firing(name: str) -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == name]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


def test_panels_are_told_apart_and_explain_themselves() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in PANELS:
        assert panel["description"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        if panel["type"] != "heatmap":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))


def test_what_an_alert_looks_at_is_on_the_dashboard() -> None:
    """So that an operator sees how it came to that, and when it is over."""

    def metrics(expression: str) -> set[str]:
        return {
            re.sub("_(bucket|sum|count)$", "", name)
            for name in re.findall(r"(?<![:\w])(?:rdt|process)_\w+", expression)
        }

    def outcomes(expression: str) -> set[str]:
        return {one for some in re.findall(r'outcome=~?"([\w|]+)"', expression) for one in some.split("|")}

    shown = "\n".join(target["expr"] for panel in PANELS for target in panel["targets"])
    for alert in ALERTS:
        assert metrics(alert["expr"]) <= metrics(shown), alert["alert"]
        if "rdt_requests_total" in alert["expr"]:
            assert outcomes(alert["expr"]) <= outcomes(shown), alert["alert"]


def test_figures_are_those_of_now() -> None:
    """The last sample of half an hour would show a server as ready long after it is gone."""
    for panel in PANELS:
        for target in panel["targets"]:
            assert (target["instant"], target["range"]) == ((True, False) if panel["type"] == "stat" else (False, True))


def test_panels_lie_side_by_side() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24, panel["title"]
                assert (x, y) not in taken, f"{panel['title']} covers {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_the_dashboard_finds_its_data_source() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    (variable,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, a part of Prometheus, is not on the PATH")
@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "rules.yml", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ],
)
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
