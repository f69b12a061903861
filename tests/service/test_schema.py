"""What is a request and what is a batch, before any transport."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidArgument, TooLarge
from service.limits import Limits
from service.schema import DenoiseRequest, read_batch, read_request
from service.text import check_characters

LIMITS = Limits(max_seq_len=32, max_steps=100, max_top_k=5, max_timeout_ms=1000, max_batch_items=2)
ONE: dict[str, Any] = {"text": "a [MASK]"}


@pytest.mark.parametrize(("field", "most"), [("max_steps", 100), ("top_k", 5), ("timeout_ms", 1000)])
def test_a_ceiling_can_be_asked_for_and_no_more(field: str, most: int) -> None:
    assert getattr(read_request({**ONE, field: most}, LIMITS), field) == most
    with pytest.raises(InvalidArgument, match=f"{field} is {most + 1}"):
        read_request({**ONE, field: most + 1}, LIMITS)


def test_a_text_has_as_many_characters_as_allowed_and_no_more() -> None:
    check_characters("a" * LIMITS.max_characters, LIMITS)
    with pytest.raises(TooLarge, match=f"text has {LIMITS.max_characters + 1} characters"):
        check_characters("a" * (LIMITS.max_characters + 1), LIMITS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([ONE], "the request is an array: want an object with the field items"),
        ({}, "items is missing: want an array of 1 to 2 objects with the field text"),
        ({"items": ONE}, "items is an object: want an array of 1 to 2 objects with the field text"),
        ({"items": []}, "items is an array of 0: want an array of 1 to 2 objects with the field text"),
        ({"items": [ONE] * 3}, "items is an array of 3: want an array of 1 to 2 objects with the field text"),
        ({"items": [ONE], "max_steps": 0}, "max_steps is 0: want a whole number from 1 to 100"),
    ],
)
def test_a_batch_that_is_none_is_refused_as_a_whole(fields: object, message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_batch(fields, LIMITS)
    assert refused.value.message == message


def test_items_share_options_but_no_text() -> None:
    with pytest.raises(InvalidArgument, match="text is not a field: want one of items, max_steps"):
        read_batch({"items": [{}], "text": "a"}, LIMITS)


def test_items_have_their_own_options_first_and_fail_one_by_one() -> None:
    good, bad = read_batch({"items": [{**ONE, "max_steps": 3}, {"max_steps": 0}], "max_steps": 9, "top_k": 1}, LIMITS)
    assert good == DenoiseRequest(**ONE, max_steps=3, top_k=1)
    assert isinstance(bad, InvalidArgument)
    assert {problem.field for problem in bad.problems} == {"items[1].text", "items[1].max_steps"}


@pytest.mark.parametrize(("item", "told"), [("a", '"a"'), (None, "null"), ([ONE], "an array")])
def test_an_item_that_is_no_object_fails_alone(item: object, told: str) -> None:
    bad, good = read_batch({"items": [item, ONE]}, LIMITS)
    assert isinstance(bad, InvalidArgument)
    assert [problem.message for problem in bad.problems] == [f"items[0] is {told}: want an object with the field text"]
    assert isinstance(good, DenoiseRequest)
