"""Plain bytes over a socket to a server that speaks HTTP, and frames of HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import re


async def everything(port: int, *pieces: bytes, seconds: float = 0.01) -> bytes:
    """All that the server says until it hangs up, or falls silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(seconds)
        while piece := await asyncio.wait_for(reader.read(65_536), 0.3 if said else 5):
            said += piece
    writer.close()
    return said


def statuses(said: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", said)]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal one that is not indexed (RFC 7541, section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
