"""Our own server as a process of its own, and the weights to serve."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import BUNDLED
from benchmarks.engine import load
from rdt_core import PRESETS, Checkpoint, checkpoint

START_SECONDS = 60.0
END_SECONDS = 1.0
"""How soon a process whose connections broke has ended, if that is why."""


@dataclass(frozen=True)
class Server:
    """A running server and where it listens."""

    process: subprocess.Popen[bytes]
    url: str
    rpc_address: str
    log: Path

    def resident_mb(self) -> float:
        """Megabytes of memory it occupies, as Linux counts them."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return round(pages * resource.getpagesize() / 1e6, 1)


def unwind_on_sigterm() -> None:
    """End the process by an exception on SIGTERM, so that the servers it has started are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@contextmanager
def serving(weights: Path, *flags: str, module: Sequence[str] = ("service",)) -> Iterator[Server]:
    """`python -m service`, or what serves in its place, on free ports, ready; killed at the end, whatever happens."""
    command = [sys.executable, "-m", *module, f"--checkpoint={weights}", "--http_port=0", "--grpc_port=0", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RDT_")}
    with tempfile.NamedTemporaryFile() as file:
        process, log = subprocess.Popen(command, env=environment, stdout=file, stderr=file), Path(file.name)
        try:
            server = Server(process, *wait_until_ready(process, log), log)
            with saying_why("the server", process, log):
                yield server
        finally:
            process.kill()
            process.wait()


@contextmanager
def saying_why(who: str, process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Raises `RuntimeError` with the log, in place of what breaks off because the process has ended."""
    try:
        yield
    except Exception as error:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(END_SECONDS)
            raise RuntimeError(f"{who} ended with {status}:\n{read(log)}") from error
        raise


def read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """URL and gRPC address, from the server's log. Raises `RuntimeError` with its log if it does not get ready."""
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        said = read(log)
        url, address = (re.search(rf"listening on ({what}\S+)", said) for what in ("http://", "grpc://"))
        if "ready after" in said and url and address:  # in any order
            return url[1], address[1].removeprefix("grpc://")
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{read(log)}")


def weights_of(name: str, folder: str) -> Path:
    """The checkpoint to serve: a file, or a preset with random weights and the bundled model's tokenizer.

    Raises `CheckpointError` for a file that is none: a server that is started with it would have to tell.
    """
    if name not in PRESETS:
        checkpoint.read(name)
        return Path(name)
    path, model = Path(folder) / name / "best_model.pt", load(name)
    contents = Checkpoint(model.state_dict(), {"model": model.config.to_mapping()}, checkpoint.read(BUNDLED).tokenizer)
    checkpoint.save(path, contents)
    return path
