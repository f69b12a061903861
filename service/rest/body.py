"""Reads a JSON body, so that every error in it can be named."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request

from service.denoiser import Denoiser
from service.errors import Cancelled, Malformed, UnsupportedFormat
from service.lifecycle import Lifecycle

JSON_TYPE = "application/json"


def json_body(
    schema: dict[str, object], example: object, others: Mapping[str, object] | None = None
) -> dict[str, object]:
    """OpenAPI documentation of a route that reads its body itself: JSON, or one of the others."""
    content = {JSON_TYPE: {"schema": schema, "example": example}, **(others or {})}
    return {"requestBody": {"required": True, "content": content}}


async def received(request: Request, lifecycle: Lifecycle) -> tuple[Denoiser, object]:
    """The denoiser to answer with, and the fields of the request. Raises `Unavailable`, and what `read_json` raises."""
    lifecycle.check()  # before anything is read
    fields = await read_json(request)
    return lifecycle.denoiser, fields  # taken only now: the model may have been reloaded meanwhile


async def read_json(request: Request) -> object:
    """The body as plain values. Raises `UnsupportedFormat`, `Malformed`, `Cancelled`, and what `BodyLimit` raises."""
    return json_of(request, await read_body(request, JSON_TYPE))


async def read_body(request: Request, *media_types: str) -> bytes:
    """The body, if it is of one of these types. Raises as `read_json` does."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in media_types:
        raise UnsupportedFormat(f"the content type is {media_type[:80] or 'missing'}: want {media_types[0]}")
    try:
        return await request.body()
    except ClientDisconnect:
        raise Cancelled("the caller left while sending the request") from None


def json_of(request: Request, body: bytes) -> object:
    """The values of this body, or part of it. Raises `Malformed`, or `UnsupportedFormat` if it is compressed."""
    try:
        return parse_json(body)
    except Malformed:
        encoding = request.headers.get("content-encoding", "")
        if encoding.lower() not in ("", "identity"):
            raise UnsupportedFormat(f"the content encoding is {encoding[:80]}: want none") from None
        raise


def parse_json(body: bytes) -> object:
    """Raises `Malformed` for anything but JSON in UTF-8 that Python can hold."""
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Malformed(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"the body is not JSON: {error}") from None
    except ValueError:  # more digits than Python converts
        raise Malformed("the body has a number of more than 4300 digits") from None
    except RecursionError:
        raise Malformed("the body is nested too deeply") from None
