"""The commands. `rdt-serve` runs the server; `rdt-denoise` restores texts here, without one."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from service.errors import InvalidArgument, ServiceError
from service.process import logs, loop
from service.process.addresses import is_loopback
from service.process.signals import hangup_held
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.tracing.opening import TracingError

try:
    import resource
except ImportError:  # there is none for Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from service.local import LocalAnswer

EXIT_BAD_INPUT = 2

MOST_FILES = 16_384
"""Each connection is an open file, and may hold as much memory as the head of a request."""

log = logging.getLogger(__name__)


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serve a checkpoint until SIGTERM. 0: ended as asked; 1: could not start, or failed later; 2: bad settings."""
    open_standard_streams()
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        return _complain("rdt-serve", error, EXIT_BAD_INPUT)
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables(os.environ):
        log.warning("%s is set but is no setting", name)
    if settings.api_key is None and not is_loopback(settings.host):
        log.warning("listening on %s without RDT_API_KEY: whoever reaches the ports is served", settings.host)

    lift_limit_of_files()
    try:
        with hangup_held():
            return _serve(settings)
    except TracingError as error:
        return _complain("rdt-serve", error, EXIT_BAD_INPUT)
    except OSError as error:
        return _complain("rdt-serve", error, 1)


def open_standard_streams() -> None:
    """Open `/dev/null` for standard streams that are closed, in children too. Else sockets would get their numbers, and
    with those libuv aborts the process when it ends.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def lift_limit_of_files() -> None:
    """Raise it to `MOST_FILES`, or to what the system allows. Most shells allow 1,024 until a process asks for more.
    Where no file is left, new connections are closed unanswered, those of probes too.
    """
    if resource is not None:
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinite = resource.RLIM_INFINITY
        wanted = MOST_FILES if most == infinite else min(MOST_FILES, most)
        if now != infinite and now < wanted:
            with suppress(OSError, ValueError):  # macOS may allow fewer than it says
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _serve(settings: Settings) -> int:
    if settings.api_workers > 0:
        from service.workers.supervisor import reserved, supervise  # noqa: PLC0415 - nobody else needs it

        with reserved(settings) as chosen:  # may wait, for which there must be no event loop: it would hold back Ctrl-C
            return asyncio.run(supervise(chosen))  # uvloop cannot start process groups

    from service.runtime import serve  # noqa: PLC0415 - torch takes seconds; --help and bad settings need not wait

    return loop.run(serve(settings))


def denoise(arguments: Sequence[str] | None = None) -> int:
    """Restore a text, the lines of a file, or what is typed. 0: done; 2: bad input, each in one line.

    A bad line of a file, or one that is typed, is reported and the others are restored.
    """
    options = _denoise_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that its encoding does not have
    try:
        from service.local import LocalDenoiser  # noqa: PLC0415 - torch takes seconds; --help and bad flags do not wait

        denoiser = LocalDenoiser(options.checkpoint, options.device)
        wanted = {name: getattr(options, name) for name in ("max_steps", "threshold", "halting")}
        status = 0
        for place, text in _texts(options):
            try:
                _check_decoded(text)
                _print_answer(text, denoiser.denoise(text, **wanted))
            except ServiceError as error:
                complaint = _complain("rdt-denoise", f"{place}{error}", EXIT_BAD_INPUT)
                status = status if options.interactive else complaint
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ServiceError, OSError, ValueError) as error:  # a CheckpointError is a ValueError
        return _complain("rdt-denoise", error, EXIT_BAD_INPUT)
    return status


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}\n")


def _denoise_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="rdt-denoise", description="Restore masked text with a checkpoint, without a server.")
    parser.add_argument("--checkpoint", type=_file, required=True, help="the checkpoint file, such as best_model.pt")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="a text with [MASK] where tokens are missing")
    source.add_argument("--file", type=_file, help="a UTF-8 file; every line that is not blank is a text")
    source.add_argument("--interactive", action="store_true", help="read lines until end of file, Ctrl-D or 'exit'")
    parser.add_argument("--max_steps", "--max-steps", type=int, help="most passes to spend (default: the checkpoint's)")
    parser.add_argument("--threshold", type=float, help="as in a request (default: the checkpoint's)")
    parser.add_argument("--halting", help="gate or settle (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def _file(name: str) -> Path:
    if not name.strip():  # Path("") is the current folder
        raise argparse.ArgumentTypeError("no name: want that of a file")
    return Path(name)


def _texts(options: argparse.Namespace) -> Iterable[tuple[str, str]]:
    """Texts, each with the prefix of its error messages."""
    if options.interactive:
        return _typed_lines()
    if options.file is not None:
        return _lines(options.file)
    return [("", options.text)]


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    # A byte that is no UTF-8 becomes a lone surrogate, for `_check_decoded`: only its line is refused.
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}: ", line.rstrip("\n")


def _typed_lines() -> Iterator[tuple[str, str]]:
    if sys.stdin is None:  # closed before the program began
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in a file
    typed = sys.stdin.isatty()
    for number in count(1):
        try:
            line = input("> " if typed else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip().lower() == "exit":
            return
        if line.strip():
            yield "" if typed else f"line {number}: ", line


def _check_decoded(text: str) -> None:
    """Raise `InvalidArgument` for bytes that are not in the encoding of the input, as `surrogateescape` keeps them."""
    for place, character in enumerate(text, start=1):
        if "\udc80" <= character <= "\udcff":
            byte = ord(character) - 0xDC00
            raise InvalidArgument(f"text has the byte 0x{byte:02x} at character {place}, which cannot be decoded")


def _print_answer(text: str, answer: LocalAnswer) -> None:
    print(f"Input: {text}")
    print(f"Output: {answer.text}")
    print(f"Steps: {answer.steps}/{answer.max_steps}", flush=True)


def _complain(program: str, problem: object, status: int) -> int:
    logs.complain(program, problem)
    return status
