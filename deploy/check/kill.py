"""Runs inside the server's container and kills the server, as the kernel does when memory runs out."""

import os
import signal
from pathlib import Path

for process in Path("/proc").glob("[0-9]*"):
    if b"rdt-serve" in (process / "cmdline").read_bytes() and process.name != "1":
        os.kill(int(process.name), signal.SIGKILL)
