"""What a log line looks like: one line of text, or one JSON object, that names the call it belongs to.

Callers' text reaches the log in messages and exceptions. It must not look like log lines of its own. So control
characters, line breaks among them, are escaped, and the lines of a traceback are indented.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from service import calls

Format = Literal["text", "json"]

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}


def configure(level: str, form: Format) -> None:
    """Everything that is logged in this process goes to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(_worth_a_line)
    if form == "json":
        logging.captureWarnings(True)  # else warnings would be the only lines that are not JSON


def _worth_a_line(record: logging.LogRecord) -> bool:
    """False for three kinds of gRPC's records: of metadata that is not UTF-8, which it quotes in full, even a caller's
    key; of an answer that could not be sent, which only says that a caller has left; and of its event loop, at the
    debug level with every call.
    """
    unwanted = ("Invalid encoding on", "ExecuteBatchError raised in core", "[_cygrpc] Loaded running loop")
    return not str(record.msg).startswith(unwanted)


def complain(program: str, problem: object) -> None:
    """Say in one line why a program ends: as a log record if the log is JSON, else plainly on stderr."""
    line = " ".join(str(problem).split())
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        logging.getLogger(program).critical("%s", line)
    else:
        with suppress(OSError):  # a full disk, or nobody who reads it: the exit status says it, too
            print(f"{program}: {line}", file=sys.stderr)


class TextLines(logging.Formatter):
    """`2026-11-23 01:11:00,123 INFO service.runtime [the call's id]: listening`"""

    def format(self, record: logging.LogRecord) -> str:
        call = calls.current.get()
        name = record.name if call is None else f"{record.name} [{call.id}]"
        line = f"{self.formatTime(record)} {record.levelname} {name}: {_message(record).translate(_ESCAPES)}"
        below = [f"  {text.translate(_ESCAPES)}" for text in _below(self, record).splitlines()]
        return "\n".join([line, *below])


class JsonLines(logging.Formatter):
    """One object a line; the times are RFC 3339 in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, object] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if (call := calls.current.get()) is not None:
            entry["request_id"] = call.id
            if call.trace_id:
                entry["trace_id"] = call.trace_id
        entry.update(getattr(record, "fields", {}))
        if below := _below(self, record):
            entry["exception"] = below
        return json.dumps(entry)  # to ASCII, with every control character escaped


def fields(**named: object) -> Mapping[str, object]:
    """For `extra=` of a log call: values that JSON lines have as fields of their own, beside the message."""
    return {"fields": named}


def _message(record: logging.LogRecord) -> str:
    return record.getMessage().rstrip("\n")  # some libraries end messages with a line break


def _below(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback, if the record has one, and the stack, if it was asked for."""
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
