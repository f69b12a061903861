"""The operations page is what the code says, and every alert has its page to turn to."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "operations.md"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """`docs/` is no package."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_code_declares(generator: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert generator.filled(page) == page, "run `make docs`"
    assert "| `RDT_TOKEN_BUDGET` | `0` | 0 to 2147483647 |" in page
    assert "| `rdt_halts_total` | counter | `reason`: gate, max_steps, deadline |" in page


def test_a_page_without_a_place_for_a_table_is_an_error(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place for settings"):
        generator.filled("<!-- metrics -->\n<!-- end of metrics -->\n")


def test_every_alert_has_a_section() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    sections = re.findall(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(alerts)


def test_every_setting_and_metric_that_is_named_exists(generator: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    known = generator.settings_table() + generator.metrics_table()
    named = set(re.findall(r"RDT_[A-Z_]+[A-Z]", page)) | set(re.findall(r"rdt_[a-z_]+[a-z]", page))
    suffixes = ("_sum", "_count", "_bucket", "")
    unknown = {name for name in named if not any(f"`{name.removesuffix(suffix)}`" in known for suffix in suffixes)}
    assert not unknown
