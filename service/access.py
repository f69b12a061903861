"""A key, of the API or of reloads: `Authorization: Bearer KEY` or `X-API-Key: KEY`, the same on every transport."""

from __future__ import annotations

import hmac

from service.errors import Unauthenticated


def is_sendable(key: str) -> bool:
    """Only such keys arrive unchanged both in HTTP headers and in gRPC metadata; clients trim spaces."""
    return key.isascii() and key.isprintable() and key == key.strip()


class ApiKey:
    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def check(self, authorization: bytes, x_api_key: bytes) -> None:
        """Raises `Unauthenticated` unless one of the headers, empty if it was not sent, holds the key."""
        scheme, _, token = authorization.partition(b" ")
        bearer = token.strip() if scheme.lower() == b"bearer" else b""
        if not hmac.compare_digest(bearer, self._key) | hmac.compare_digest(x_api_key, self._key):
            raise Unauthenticated("send the key as 'Authorization: Bearer KEY' or as 'X-API-Key: KEY'")
