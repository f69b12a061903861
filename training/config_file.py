"""From YAML to a checked configuration: a file, an override file laid over it, then `section.key=value`."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from training.config import ConfigError, TrainConfig, one_line


def load_config(path: str | Path, override: str | Path | None = None, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, lay an override file over it, then assignments `section.key=value`, which are not YAML."""
    values = _read_yaml(path)
    if override is not None:
        values = _merge(values, _read_yaml(override))
    for assignment in assignments:
        values = _merge(values, _parse_assignment(assignment))
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """A checked configuration from plain nested values. Raises `ConfigError`."""
    config = _build(TrainConfig, values, prefix="")
    assert isinstance(config, TrainConfig)
    return config


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loaders drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return node


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, a date or number that is none, ...
        raise ConfigError(f"{path}: not YAML: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, want sections with keys")
    return values


class _Said(str):
    """The value of an assignment. Its setting tells whether it is a number, a truth value or text. By YAML's rules 010
    would be 8, 1:30 90, and `run #2` would end at the blank.
    """

    def as_one_of(self, kinds: Sequence[type]) -> Any:
        meant = {"null": None, "true": True, "false": False}.get(self.lower(), self)
        if type(meant) in kinds:
            return meant
        if int in kinds:
            with suppress(ValueError):
                return int(self)
        return str(self)


def _parse_assignment(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"{assignment!r}: want section.key=value")
    value: Any = _Said(text)
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and not isinstance(value, dict):
            raise ConfigError(f"{key} is {value!r}: want keys under it")
        merged[key] = _merge(below, value) if isinstance(below, dict) else value
    return merged


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {values!r}: want keys under it")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    for key in values:
        if key not in names:
            meant = _elsewhere(key)
            wanted = f", but {meant} is" if meant else f"; known here: {', '.join(sorted(names))}"
            raise ConfigError(f"{prefix}{key} is not a setting{wanted}")
    built = {
        key: _build(hints[key], value, f"{prefix}{key}.")
        if is_dataclass(hints[key])
        else _typed(hints[key], value, prefix + key)
        for key, value in values.items()
    }
    return kind(**built)


def _elsewhere(key: str) -> str | None:
    """The setting of this name in whatever section has one."""
    sections = typing.get_type_hints(TrainConfig)
    names = [
        *sections,
        *(f"{name}.{f.name}" for name, kind in sections.items() if is_dataclass(kind) for f in fields(kind)),
    ]
    return next((name for name in names if name.rpartition(".")[2] == key), None)


def _typed(hint: Any, value: Any, key: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _Said):
        value = value.as_one_of(kinds)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and not isinstance(value, bool):
        try:  # YAML reads 3e-4 as text
            number = float(value)
        except (TypeError, ValueError):
            pass
        except OverflowError:
            raise ConfigError(f"{key} is {value!r}: want a finite number") from None
        else:
            if not math.isfinite(number):
                raise ConfigError(f"{key} is {value!r}: want a finite number")
            return number
    for kind in (bool, int, str):
        if kind in kinds and type(value) is kind:
            return value
    wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ConfigError(f"{key} is {value!r}: want {wanted}")
