"""The RFC 9457 problem document and the answer to a batch, as the server writes them and the client reads them."""

from __future__ import annotations

from pydantic import BaseModel, Field

from service.errors import Printable
from service.schema import DenoiseAnswer

PROBLEM_JSON = "application/problem+json"


class BadField(BaseModel):
    """What is wrong with one field, and the value it had."""

    field: str
    message: str
    value: Printable = None


class Problem(BaseModel):
    """`application/problem+json`."""

    type: str = Field(description="`urn:rdt:problem:` and the error's code; `about:blank` for plain HTTP errors.")
    title: str
    status: int
    detail: str
    errors: list[BadField] = Field(default=[], description="One entry for each field that is to blame.")
    request_id: str = Field(default="", description="Also in the header X-Request-Id.")


class BatchResult(BaseModel):
    """What became of one item: an answer or a problem, never both."""

    answer: DenoiseAnswer | None = None
    problem: Problem | None = None


class BatchAnswer(BaseModel):
    results: list[BatchResult] = Field(description="As many as items, in their order.")
