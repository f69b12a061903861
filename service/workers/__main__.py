"""A child of the supervisor: the engine's process or a worker, as the first line of standard input says."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from service.process import logs, loop
from service.process.signals import asked_to_end
from service.settings import Settings
from service.tracing.opening import TracingError
from service.workers.children import BAD_INPUT, CANNOT_START, CRASHED, TELL, Orders, end_with_parent, start_pulse

log = logging.getLogger(__name__)


def main() -> int:
    faulthandler.register(TELL)
    orders = Orders.read(read_line(sys.stdin.fileno()))
    settings = Settings(**orders.settings)
    logs.configure(settings.log_level, settings.log_format)
    try:
        return loop.run(run(orders, settings))
    except TracingError as error:
        return complain(error, BAD_INPUT)
    except OSError as error:
        return complain(error, CANNOT_START)
    except Exception:
        log.exception("the %s has crashed", orders.role)
        return CRASHED


async def run(orders: Orders, settings: Settings) -> int:
    # Imports come before the signal handler: until then, a signal simply ends the process.
    if orders.role == "worker":
        from service.workers import worker  # noqa: PLC0415
    else:
        from service.workers import engine  # noqa: PLC0415
    stopped = asked_to_end()
    start_pulse()
    orphaned, path = end_with_parent(stopped), Path(orders.socket)
    if orders.role == "worker":
        return await worker.run(settings, orders.name, path, stopped)

    status = await engine.run(settings, path, stopped)
    if orphaned.is_set():
        with suppress(OSError):  # the supervisor, which made the folder, can no longer remove it
            path.unlink(missing_ok=True)
            path.parent.rmdir()
    return status


def read_line(pipe: int) -> str:
    """Byte by byte: the rest must stay there, since the end is watched for."""
    line = bytearray()
    while (byte := os.read(pipe, 1)) not in (b"\n", b""):
        line += byte
    return line.decode()


def complain(problem: object, status: int) -> int:
    logs.complain("rdt-serve", problem)
    return status


if __name__ == "__main__":
    sys.exit(main())
