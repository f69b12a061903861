"""`GET /`: a page to try the model by hand. One file, nothing loaded from elsewhere.

It holds nothing secret and needs no key to open. If the server asks for a key, the user types it into the page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse

PATH = "/"
PAGE = Path(__file__).with_name("static") / "playground.html"


def add_routes(app: FastAPI) -> None:
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get(PATH, include_in_schema=False)
    async def playground(_: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def content_security_policy(page: str) -> str:
    """Allows this page's own script and style, by their hashes, and requests to this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(page, 'script')}",
            f"style-src {_hash_of(page, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_of(page: str, element: str) -> str:
    found = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    assert found is not None, f"the playground has no <{element}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
