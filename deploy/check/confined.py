"""Runs inside the server's container: nobody special, nothing writable, and held to the limits it was given."""

from __future__ import annotations

import os
import resource
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NONE = 1 << 60  # what version 1 of control groups shows for no limit is near 2 ** 63


def first(*names: str) -> list[str]:
    """The words of the first of these files that is there: version 2 of control groups, or version 1."""
    return next((CGROUP / name).read_text().split() for name in names if (CGROUP / name).exists())


def n_cores() -> float:
    if (CGROUP / "cpu.max").exists():
        quota, period = first("cpu.max")
    else:
        (quota,), (period,) = first("cpu/cpu.cfs_quota_us"), first("cpu/cpu.cfs_period_us")
    return -1.0 if quota in ("max", "-1") else int(quota) / int(period)


def is_writable(folder: str) -> bool:
    try:
        (Path(folder) / "touched").touch()
    except OSError:
        return False
    return True


def main() -> None:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    (memory,) = first("memory.max", "memory/memory.limit_in_bytes")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    problems = {
        "is root": os.getuid() == 0,
        "has capabilities": int(status["CapEff"], 16) != 0,
        "may gain privileges": status["NoNewPrivs"] != "1",
        "can write to /, /app, /opt/rdt or /models": any(map(is_writable, ("/", "/app", "/opt/rdt", "/models"))),
        "cannot write to /tmp": not is_writable("/tmp"),
        "has no limit of memory": memory == "max" or int(memory) > NONE,
        "has no limit of CPU": n_cores() <= 0,
        "has too many open files": files > 20_000,
    }
    if any(problems.values()):
        raise SystemExit("it " + ", ".join(problem for problem, found in problems.items() if found))
    print(f"uid {os.getuid()}, no capability, read-only; {int(memory) >> 20} MiB, {n_cores():g} cores, {files} files")


if __name__ == "__main__":
    main()
