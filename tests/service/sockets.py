"""Plain bytes over a socket to a server that speaks HTTP."""

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
