"""A peer's environment and its processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.load import Request, Unsuccessful, rest_sender
from benchmarks.peer_servers.setting import Setting
from benchmarks.server import read, saying_why

ROOT = Path(__file__).parents[2]
FIRST = Request("[MASK]", max_steps=1, n_tokens=3, n_masked=1)
START_SECONDS = 120.0
STOP_SECONDS = 20.0


def requirements(name: str) -> Path:
    return Path(__file__).parent / name / "requirements.txt"


def package(name: str) -> str:
    """The peer's own package and its version."""
    return requirements(name).read_text(encoding="utf-8").splitlines()[0]


def python_of(name: str) -> Path:
    """The interpreter of the peer's environment, made once and again when what it requires has changed."""
    folder, wanted = ROOT / ".venv-peers" / name, requirements(name)
    python, stamp = folder / "bin" / "python", folder / wanted.name
    if not stamp.exists() or stamp.read_bytes() != wanted.read_bytes():
        print(f"making an environment for {package(name)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "-r", wanted, "-c", ROOT / "constraints.txt"], check=True)
        shutil.copyfile(wanted, stamp)
    return python


@contextmanager
def running(name: str, setting: Setting, weights: Path) -> Iterator[str]:
    """The URL of a peer that answers; it and every process of its own are gone at the end, whatever happens."""
    port = free_port()
    flags = [f"--checkpoint={weights.resolve()}", f"--port={port}", *setting.flags()]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": folder, **setting.environment()}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [python_of(name), "-m", f"benchmarks.peer_servers.{name}.server", *flags],
                cwd=ROOT, env={**os.environ, **own}, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until_answered(process, url := f"http://127.0.0.1:{port}", log)
            with saying_why("the peer", process, log):
                yield url
        finally:
            stop(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_answered(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Raises `RuntimeError` with the peer's log if no request succeeds in time."""
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        with suppress(Unsuccessful, OSError, EOFError):
            return asyncio.run(_ask(url))
        time.sleep(0.1)
    raise RuntimeError(f"the peer did not start:\n{read(log)}")


async def _ask(url: str) -> None:
    async with rest_sender(url) as send:
        await send(FIRST)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask nicely, then end the whole session: some peers give their workers process groups of their own."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:  # for the impatient, too, whose second Ctrl-C ends the wait
        for pid in _session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _session(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return found
