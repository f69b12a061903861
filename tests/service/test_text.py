"""What is written into a text, beyond what a whole service shows."""

from __future__ import annotations

import json
from unicodedata import normalize

import pytest

from rdt_core import Tokenizer
from service.engine.types import Choice, Reading, Result
from service.text import Draft, hide, write_back

LETTERS = ["ᄒ", "##ᅡ", "##ᆫ", "##ᆨ"]  # 한 is the first three, 학 has the last in place of the third
ACROSS = ["##ᆫᄀ", "##ᅮ"]  # of 한국: the first is the end of one syllable and the beginning of the next


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Tokenizer) -> Tokenizer:
    fields = json.loads(tiny_tokenizer.json)
    fields["model"]["vocab"] |= {letter: tiny_tokenizer.vocab_size + i for i, letter in enumerate(LETTERS + ACROSS)}
    return Tokenizer(json.dumps(fields))


def test_of_a_character_that_is_several_tokens_none_is_lost(tokenizer: Tokenizer) -> None:
    """Whichever of them the model reads differently."""
    encoding = tokenizer.encode("the 한 fox")
    tokens, rows = list(encoding.ids), list(range(len(encoding.ids)))
    tokens[4] += 1
    shares = [0.5] * len(rows)
    result = Result(tokens, rows, shares, [1] * len(rows), [[]] * len(rows), 1, [0.1], "max_steps", 1)
    written = write_back(encoding, result, tokenizer)
    assert normalize("NFC", written.text) == "the 학 fox"
    assert [written.text[r.start : r.end] for r in written.restored] == ["ᄒ", "ᅡ", "ᆨ"]
    reading = Reading(0.1, "max_steps", [Choice(row, tokens[row], 0.5, []) for row in rows], [])
    assert Draft(encoding, tokenizer).after(reading) == written.text


def test_a_character_that_is_read_as_it_stands_stays_as_it_was_sent(tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode("the 한 fox")
    rows = list(range(len(encoding.ids)))
    reading = Reading(0.1, "max_steps", [Choice(row, encoding.ids[row], 0.5, []) for row in rows], [])
    assert Draft(encoding, tokenizer).after(reading) == "the 한 fox"


def test_a_token_across_characters_is_hidden_with_all_that_share_one_of_them(tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode("the 한국 fox")
    assert encoding.ids[4] == tokenizer.vocab_size - len(ACROSS)
    texts = set()
    for seed in range(40):
        hidden = hide(encoding, tokenizer, 0.15, seed)
        texts.add(hidden.text)
        assert hidden.ids.count(tokenizer.mask_id) == sum(hidden.masked) == hidden.text.count("[MASK]")
        visible = {token: span for token, span in zip(hidden.ids, hidden.spans, strict=True) if span[0] < span[1]}
        for token, span in zip(encoding.ids, encoding.spans, strict=True):
            if token in visible:
                assert hidden.text[slice(*visible[token])] == encoding.text[slice(*span)]
    assert {"the [MASK] fox", "[MASK] 한국 [MASK]"} <= texts
    assert {text.replace("[MASK]", "") for text in texts} <= {"the  fox", "the  ", "  fox", " 한국 "}


@pytest.mark.parametrize("text", ["the cafe\u0301 fox", "the jump\u0301s\u0301 fox"])
def test_accents_go_with_the_word_they_stand_on(tiny_tokenizer: Tokenizer, text: str) -> None:
    """A word that is hidden left them in the text, on the mask; one that is read differently, on the new word."""
    encoding = tiny_tokenizer.encode(text)
    hidden = hide(encoding, tiny_tokenizer, 1.0, 0)
    assert "\u0301" not in hidden.text
    rows = list(range(len(encoding.ids)))
    reading = Reading(0.1, "max_steps", [Choice(row, tiny_tokenizer.encode("dog").ids[1], 0.5, []) for row in rows], [])
    assert Draft(encoding, tiny_tokenizer).after(reading).replace("dog", "").isspace()
    kept = Reading(0.1, "max_steps", [Choice(row, encoding.ids[row], 0.5, []) for row in rows], [])
    assert Draft(encoding, tiny_tokenizer).after(kept) == text
