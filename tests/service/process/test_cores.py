"""How many cores a container really has: both versions of the control groups' interface, from files of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.process.cores import cpu_quota, usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "words\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_is_read(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("190000", 1), ("200000", 2), ("900000", 4)])
def test_no_more_cores_than_the_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert usable_cores(tmp_path) == 4, "no files, no bound"
    write(tmp_path / "cpu.max", f"{quota} 100000\n")
    assert usable_cores(tmp_path) == cores
