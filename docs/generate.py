"""The tables of `operations.md` that the code knows better: `python docs/generate.py`, or `make docs`.

Between a line `<!-- settings -->` and a line `<!-- end of settings -->` stands what `service.settings` declares;
the same with `metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from service.metrics import Declaration, Metrics
from service.settings import PREFIX, WORDS, Settings

PAGE = Path(__file__).with_name("operations.md")


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with its tables as they should be. Raises `ValueError` for a page without a place for one."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if place.search(page) is None:
            raise ValueError(f"{PAGE.name} has no place for {name}")
        page = place.sub(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", page)
    return page


def settings_table() -> str:
    rows = [
        (f"`{PREFIX}{name.upper()}`", _default(field), WORDS.get(name) or _range(field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    return _table(("variable", "default", "values", "meaning"), rows)


def metrics_table() -> str:
    rows = [(f"`{one.name}`", one.kind, _labels(one), one.meaning) for one in Metrics(lambda: 0.0).declared]
    return _table(("metric", "kind", "labels; buckets", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    return "none" if field.default is None else f"`{field.default}`"


def _range(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    bounds = {name: getattr(rule, name) for rule in field.metadata for name in ("ge", "le") if hasattr(rule, name)}
    if "ge" in bounds:
        return f"{bounds['ge']} to {bounds['le']}" if "le" in bounds else f"{bounds['ge']} or more"
    return "text"


def _labels(one: Declaration) -> str:
    parts = [f"`{name}`" + (": " if values else "") + ", ".join(values) for name, values in one.labels.items()]
    if one.buckets:
        parts.append(f"{one.buckets[0]:g} to {one.buckets[-1]:g} in {len(one.buckets)} steps")
    return "; ".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
