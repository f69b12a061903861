"""One connection between a worker and the engine: messages in order, bounded in both directions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgpack

from service.workers.messages import Message, read, write

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
"""Largest message that is read. The largest that is sent is a tokenizer, of a megabyte or so."""
MAX_UNSENT_BYTES = 64 * 2**20
"""With more unsent, the other end no longer reads, and the connection is closed."""
CROWDED_BYTES = 4 * 2**20
"""With more unsent, the other end is behind, and new requests are refused."""


class Wire(asyncio.Protocol):
    """Calls `on_message` with each message, and `on_end` once at the end."""

    def __init__(self, on_message: Callable[[Wire, Message], None], on_end: Callable[[Wire], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def crowded(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() > CROWDED_BYTES

    def send(self, message: Message) -> None:
        """Does nothing once the connection has ended: whoever waits for an answer has been told then."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(msgpack.packb(write(message)))
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.error("the other end of a connection does not read: closing it")
            self._transport.abort()

    def close(self) -> None:
        """Messages written before are still sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # not every loop's transport derives from it

    def data_received(self, received: bytes) -> None:
        try:
            self._unpacker.feed(received)
            messages = [read(array) for array in self._unpacker]
        except (ValueError, TypeError, msgpack.UnpackException):
            log.exception("a message that cannot be read: closing the connection")
            self.abort()
            return
        for message in messages:
            self._on_message(self, message)

    def connection_lost(self, _error: Exception | None) -> None:
        self._on_end(self)
