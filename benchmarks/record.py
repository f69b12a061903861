"""What every benchmark ends with: one JSON line that says what was measured, where and when."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast matrix products are, in which number format."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with `--save NAME`, which keeps the JSON line as `results/NAME.json`, too."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--save", type=_name, metavar="NAME", help="keep the JSON line as benchmarks/results/NAME.json")
    return made


def _name(text: str) -> str:
    if text in ("", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r}: want a name")
    return text


def finish(benchmark: str, options: argparse.Namespace, **figures: Any) -> None:
    """Print the one JSON line, and keep it if `--save` asks for that."""
    asked = {name: v.name if isinstance(v, Path) else v for name, v in vars(options).items() if name != "save"}
    code = {"date": str(date.today()), "commit": commit(), "machine": machine()}
    line = {"benchmark": benchmark, **code, "options": asked, "files": files(options), **figures}
    if options.save:
        path = RESULTS / f"{options.save}.json"
        path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(line))


def files(options: argparse.Namespace) -> dict[str, str]:
    """The beginning of the SHA-256 of every file among the options (weights, texts), by name."""
    values = [one for value in vars(options).values() for one in (value if isinstance(value, list) else [value])]
    named = [Path(one) for one in values if isinstance(one, str | Path) and one and Path(one).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in named}


def commit() -> str | None:
    """The commit of the code, with `-dirty` if it was changed since; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """The processor as it names itself, usable cores, matrix instructions, and the versions that matter."""
    processor, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": cores,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "python": platform.python_version(),
        "torch": _torch_version(),
    }


def _torch_version() -> str | None:
    """Read from the package metadata: importing torch takes seconds, and a simulation does not need it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
