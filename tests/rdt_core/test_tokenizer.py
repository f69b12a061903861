from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rdt_core import Encoding, Tokenizer
from rdt_core.tokenizer import LONG_TEXT, MASK, NOT_ONE, Fill, fill

quick = settings(max_examples=60)
typed_text = st.lists(
    st.sampled_from(
        ["[MASK]", "[mask]", " ", "  ", "\n", "\t", "the", "Fox", "café", "é", "🦊", "##s", "[SEP]", "[", "."]
    )
    | st.text(max_size=4)
).map("".join)


def pieces_of(tokenizer: Tokenizer, encoding: Encoding) -> list[str]:
    return [tokenizer.piece(token) for token in encoding.ids]


def words_of(encoding: Encoding) -> list[str]:
    """The characters each token stands for."""
    return [encoding.text[start:end] for start, end in encoding.spans]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[MASK] fox", ["[MASK]", "fox"]),
        ("the [mask]", ["the", "[MASK]"]),
        ("the [Mask] fox", ["the", "[MASK]", "fox"]),
        ("[MASK]", ["[MASK]"]),
        ("[MASK][mAsK]", ["[MASK]", "[MASK]"]),
        ("jump[MASK]", ["jump", "[MASK]"]),
        ("[[MASK]]", ["[", "[MASK]", "]"]),
        ("[ MASK ]", ["[", "m", "##a", "##s", "##k", "]"]),
        ("", []),
    ],
)
def test_masks_count_wherever_they_stand_and_in_any_case(
    tiny_tokenizer: Tokenizer, text: str, pieces: list[str]
) -> None:
    encoding = tiny_tokenizer.encode(text)
    assert pieces_of(tiny_tokenizer, encoding) == ["[CLS]", *pieces, "[SEP]"]
    assert encoding.masked == [False, *(piece == "[MASK]" for piece in pieces), False]


def slowly(tokenizer: Tokenizer, text: str) -> Encoding:
    with patch.object(tokenizer, "_normalized", None):
        return tokenizer.encode(text)


def takes_the_faster_way(tokenizer: Tokenizer, text: str) -> bool:
    assert tokenizer._normalized is not None, "nothing is tested here"
    return NOT_ONE not in tokenizer._letters.normalize(text)


@settings(max_examples=600)
@given(
    st.lists(
        st.sampled_from(
            ["[MASK]", "[mask]", "[Mask]", "[SEP]", " ", "\n", "The", "foxes", "##s", "É", "e\u0301", "–", "狐"]
        )
        | st.text(max_size=4)
        | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x24F), max_size=6)
    ).map("".join)
)
@example("[[MASK]mask]")
@example("[mas\u212a]")  # folds to k
@example("e\u0323\u0301")  # put in order
def test_normalized_text_has_a_faster_way_in_to_the_same_tokens(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert tiny_tokenizer.encode(text) == slowly(tiny_tokenizer, text)


def test_every_character_is_normalized_alike_on_both_ways(tiny_tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer(tiny_tokenizer.json)
    normalizer = tokenizer._typed.normalizer
    assert normalizer is not None
    kept = 0
    for start in (0, *range(0x80, 0xD800, 0x80), *range(0xE000, 0x10000, 0x80)):
        characters = [chr(code) for code in range(start, start + 0x80)]
        text = "".join(filter(lambda character: takes_the_faster_way(tokenizer, character), characters))
        assert tokenizer._letters.normalize(text) == normalizer.normalize_str(text)
        kept += len(text)
    assert kept > 15_000  # of the rest most are Chinese and Korean


@pytest.mark.parametrize(
    "text", ["The [mask] fox", "two\nlines\tand a tab", "CAFÉ – “naïve” ½ £3", "Ελλάς Россия İstanbul"]
)
def test_most_of_what_people_write_takes_the_faster_way(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert takes_the_faster_way(tiny_tokenizer, text)
    assert tiny_tokenizer.encode(text) == slowly(tiny_tokenizer, text)


@pytest.mark.parametrize("text", ["狐", "e\u0301", "\u302e\u1b44", "a\u200bb", "한", "🦊", "\0"])
def test_characters_that_are_moved_or_dropped_or_become_several_do_not(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert not takes_the_faster_way(tiny_tokenizer, text)


def change(definition: str, **fields: object) -> Tokenizer:
    return Tokenizer(json.dumps(json.loads(definition) | fields))


def test_a_tokenizer_that_normalizes_otherwise_has_no_faster_way(tiny_tokenizer: Tokenizer) -> None:
    fields = json.loads(tiny_tokenizer.json)
    cased = change(tiny_tokenizer.json, normalizer=fields["normalizer"] | {"lowercase": False, "strip_accents": True})
    assert cased._normalized is None
    assert not any(cased.encode("[MÁSK]").masked)
    assert change(tiny_tokenizer.json, normalizer={"type": "Sequence", "normalizers": []})._normalized is None
    assert change(tiny_tokenizer.json, normalizer=None)._normalized is None
    own = {"id": 7, "content": "FOX", "special": False, "normalized": True}
    own |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    assert change(tiny_tokenizer.json, added_tokens=[*fields["added_tokens"], own])._normalized is None


@pytest.mark.parametrize("strictness", ["lstrip", "rstrip", "single_word"])
def test_a_mask_is_its_own_characters_whatever_the_file_says_and_other_tokens_are_as_it_says(
    tiny_tokenizer: Tokenizer, strictness: str
) -> None:
    fields = json.loads(tiny_tokenizer.json)
    own = {"id": tiny_tokenizer.vocab_size, "content": "ver", "special": False, "normalized": False}
    own |= {"lstrip": False, "rstrip": False}
    added = [
        *(token | {strictness: token["content"] == "[MASK]"} for token in fields["added_tokens"]),
        own | {"single_word": True},
    ]
    tokenizer = change(tiny_tokenizer.json, added_tokens=added)
    assert words_of(tokenizer.encode("a [MASK] b[MASK]c")) == ["", "a", "[MASK]", "b", "[MASK]", "c", ""]
    assert words_of(tokenizer.encode("ver over")) == ["", "ver", "over", ""]


def test_spans_index_the_text_as_it_was_sent(tiny_tokenizer: Tokenizer) -> None:
    encoding = tiny_tokenizer.encode("  The CAFÉ \n [Mask]  jumps 🦊🦊.")
    assert words_of(encoding) == ["", "The", "CAFÉ", "[Mask]", "jump", "s", "🦊🦊", ".", ""]
    assert encoding.spans[-1] == (len(encoding.text), len(encoding.text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Cafe\u0301 fox", ["Cafe\u0301", "fox"]),
        ("e\u0323\u0301.\u0301 \u0301fox", ["e\u0323\u0301", ".\u0301", "fox"]),
        ("a\u0301b jump\u0301s\u0301", ["a\u0301", "b", "jump\u0301", "s\u0301"]),
        ("x[MASK]\u0301", ["x", "[MASK]"]),
    ],
)
def test_a_token_has_the_accents_on_its_last_character_and_a_mask_has_none(
    tiny_tokenizer: Tokenizer, text: str, words: list[str]
) -> None:
    """The normalizer drops them, and the next token begins behind them."""
    assert words_of(tiny_tokenizer.encode(text))[1:-1] == words


def test_an_accent_that_is_a_token_by_itself_belongs_to_no_other(tiny_tokenizer: Tokenizer) -> None:
    """Where the normalizer keeps accents."""
    as_it_is = json.loads(tiny_tokenizer.json)["normalizer"] | {"lowercase": False, "strip_accents": False}
    keeps = change(tiny_tokenizer.json, normalizer=as_it_is)
    assert words_of(keeps.encode("fox.\u0301"))[1:-1] == ["fox", ".", "\u0301"]


@quick
@given(typed_text)
def test_an_encoding_is_in_order_and_flags_exactly_the_masks(tiny_tokenizer: Tokenizer, text: str) -> None:
    encoding = tiny_tokenizer.encode(text)
    assert len(encoding.ids) == len(encoding.spans) == len(encoding.masked)
    inner = encoding.spans[1:-1]
    assert all(end <= start for (_, end), (start, _) in pairwise(inner))
    assert [encoding.spans[row] for row, masked in enumerate(encoding.masked) if masked] == [
        match.span() for match in MASK.finditer(text)
    ]
    special = {tiny_tokenizer.cls_id, tiny_tokenizer.sep_id, tiny_tokenizer.pad_id, tiny_tokenizer.mask_id}
    typed = [token for token, masked in zip(encoding.ids, encoding.masked, strict=True) if not masked][1:-1]
    assert not special.intersection(typed)


@quick
@given(typed_text)
@example("[MA[MASK]SK][mask]é[SEP][MASK]")
def test_text_around_a_mask_is_read_as_if_it_stood_alone(tiny_tokenizer: Tokenizer, text: str) -> None:
    encoding = tiny_tokenizer.encode(text)
    ids, spans, read = [], [], 0
    for start, end in [*(match.span() for match in MASK.finditer(text)), (len(text), len(text))]:
        alone = tiny_tokenizer.encode(text[read:start])
        ids += alone.ids[1:-1]
        spans += [(read + a, read + b) for a, b in alone.spans[1:-1]]
        if start < end:
            ids.append(tiny_tokenizer.mask_id)
            spans.append((start, end))
        read = end
    assert encoding.ids[1:-1] == ids
    assert encoding.spans[1:-1] == spans


def test_a_long_text_is_read_as_its_parts_are(tiny_tokenizer: Tokenizer) -> None:
    part, times = "The [mask] fox. ", LONG_TEXT // 8
    short, long = tiny_tokenizer.encode(part), tiny_tokenizer.encode(part * times)
    assert long.ids[1:-1] == short.ids[1:-1] * times
    shifts = range(0, len(part) * times, len(part))
    assert long.spans[1:-1] == [(start + by, end + by) for by in shifts for start, end in short.spans[1:-1]]


@pytest.mark.parametrize("typed", ["[SEP]", "[CLS]", "[PAD]", "[UNK]"])
def test_a_control_token_typed_as_text_is_text(tiny_tokenizer: Tokenizer, typed: str) -> None:
    encoding = tiny_tokenizer.encode(f"the {typed} fox")
    assert not tiny_tokenizer.special_ids.intersection(encoding.ids[1:-1])
    assert pieces_of(tiny_tokenizer, encoding)[2] == "["


def fill_masks(tokenizer: Tokenizer, text: str, *words: str) -> tuple[str, list[Fill]]:
    encoding = tokenizer.encode(text)
    rows = [row for row, masked in enumerate(encoding.masked) if masked]
    return fill(encoding, dict(zip(rows, words, strict=True)))


@quick
@given(typed_text, st.lists(st.sampled_from(["fox", "##s", ".", "é"]), min_size=1))
@example(" a  [MASK][MASK]🦊\n[mask] É", ["fox", "dog", "##s"])
def test_fill_keeps_every_other_character(tiny_tokenizer: Tokenizer, text: str, words: list[str]) -> None:
    n_masks = len(MASK.findall(text))
    written = [words[index % len(words)] for index in range(n_masks)]
    filled, fills = fill_masks(tiny_tokenizer, text, *written)
    assert [filled[f.start : f.end] for f in fills] == [f.text for f in fills]
    assert [f.text for f in fills] == [word.removeprefix("##") for word in written]
    between, read = [], 0
    for f in fills:
        between.append(filled[read : f.start])
        read = f.end
    between.append(filled[read:])
    sent = MASK.split(text)
    inside = range(1, n_masks)
    assert between == [
        " " if index in inside and kept == "" and not written[index].startswith("##") else kept
        for index, kept in enumerate(sent)
    ]


@pytest.mark.parametrize(
    ("text", "words", "filled"),
    [
        ("the [MASK] fox", ["quick"], "the quick fox"),
        ("jump[MASK]!", ["##s"], "jumps!"),
        ("[MASK][MASK]", ["new", "york"], "new york"),
        ("[MASK][MASK]", ["jump", "##ed"], "jumped"),
        ("[MASK] [MASK]", ["jump", "##ed"], "jump ed"),
        ("x[MASK]", ["fox"], "xfox"),
    ],
)
def test_how_pieces_are_written(tiny_tokenizer: Tokenizer, text: str, words: list[str], filled: str) -> None:
    assert fill_masks(tiny_tokenizer, text, *words)[0] == filled


def test_some_masks_may_stay_open(tiny_tokenizer: Tokenizer) -> None:
    encoding = tiny_tokenizer.encode("[MASK][MASK] dog")
    assert fill(encoding, {2: "lazy"}) == ("[MASK]lazy dog", [Fill(2, 6, 10, "lazy")])
    assert fill(encoding, {}) == ("[MASK][MASK] dog", [])


def test_only_masks_are_separated(tiny_tokenizer: Tokenizer) -> None:
    assert fill(tiny_tokenizer.encode("[MASK]."), {1: "fox", 2: "!"})[0] == "fox!"
    assert fill(tiny_tokenizer.encode("jumps"), {1: "dog", 2: "s"})[0] == "dogs"
    assert fill(tiny_tokenizer.encode("[MASK]."), {2: "!", 1: "fox"})[0] == "fox!", "whatever order they come in"


def test_a_corpus_may_say_unknown(tiny_tokenizer: Tokenizer) -> None:
    first, second = tiny_tokenizer.encode_training(["the [UNK] fox", "dog"])
    assert [tiny_tokenizer.piece(token) for token in first] == ["the", "[UNK]", "fox"]
    assert [tiny_tokenizer.piece(token) for token in second] == ["dog"]


def test_decode_joins_pieces_and_leaves_special_tokens_out(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("The fox jumped [MASK]").ids) == "the fox jumped"


def test_a_token_outside_the_vocabulary_has_no_piece(tiny_tokenizer: Tokenizer) -> None:
    size = tiny_tokenizer.vocab_size
    assert tiny_tokenizer.piece(size - 1)
    with pytest.raises(ValueError, match=f"token_id is {size}: want 0 <= token_id < {size}"):
        tiny_tokenizer.piece(size)


@pytest.mark.parametrize("text", ["", "{}", "not JSON", '{"model": 3}'])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a tokenizer JSON: "):
        Tokenizer(text)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "ALQC"}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("model", {"unk_token": "<unk>"}),
    ],
)
def test_what_cannot_read_is_refused(tiny_tokenizer: Tokenizer, part: str, values: dict[str, object]) -> None:
    """The first two panic in Rust, which is no `Exception`; the last one only meets a word that it does not know."""
    fields = json.loads(tiny_tokenizer.json)
    with pytest.raises(ValueError, match=r"^(not a tokenizer JSON|the tokenizer cannot read text): "):
        change(tiny_tokenizer.json, **{part: fields[part] | values})


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_refusal(tiny_tokenizer: Tokenizer, end: type[BaseException]) -> None:
    with patch.object(Tokenizer, "encode", side_effect=end), pytest.raises(end):
        Tokenizer(tiny_tokenizer.json)


def test_a_vocabulary_without_masks_is_refused(tiny_tokenizer: Tokenizer) -> None:
    values = json.loads(tiny_tokenizer.json)
    values["model"]["vocab"]["[BLANK]"] = values["model"]["vocab"].pop("[MASK]")
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "[MASK]"]
    with pytest.raises(ValueError, match=r"the tokenizer has no \[MASK\]"):
        Tokenizer(json.dumps(values))


def test_a_vocabulary_with_gaps_is_refused(tiny_tokenizer: Tokenizer) -> None:
    values = json.loads(tiny_tokenizer.json)
    values["model"]["vocab"]["fox"] = 5000
    n_tokens = tiny_tokenizer.vocab_size
    with pytest.raises(
        ValueError, match=f"the tokenizer has {n_tokens} tokens: want ids 0 to {n_tokens - 1}, each once"
    ):
        Tokenizer(json.dumps(values))


def test_added_tokens_mean_the_same_in_a_corpus_and_typed(tiny_tokenizer: Tokenizer) -> None:
    plain, control = AddedToken("covid"), AddedToken("[DOC]", special=True)
    library = tokenizers.Tokenizer.from_str(tiny_tokenizer.json)
    library.add_tokens([plain, control])
    extended = Tokenizer(library.to_str())
    [in_a_corpus] = extended.encode_training(["covid"])
    assert extended.encode("covid").ids[1:-1] == in_a_corpus
    library = tokenizers.Tokenizer.from_str(tiny_tokenizer.json)
    library.add_tokens([control, plain])
    with pytest.raises(ValueError, match="added token 'covid' follows a control token: want it before"):
        Tokenizer(library.to_str())


def test_a_tokenizer_file_is_read_and_named_when_it_is_none(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    good, bad = tmp_path / "tokenizer.json", tmp_path / "other.json"
    good.write_text(tiny_tokenizer.json, encoding="utf-8")
    bad.write_text("{}", encoding="utf-8")
    assert Tokenizer.from_file(good).encode("the fox") == tiny_tokenizer.encode("the fox")
    with pytest.raises(ValueError, match=r"other\.json: not a tokenizer JSON"):
        Tokenizer.from_file(bad)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "none.json")


def test_padding_and_truncation_of_the_json_are_switched_off(tiny_tokenizer: Tokenizer) -> None:
    values = json.loads(tiny_tokenizer.json)
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_to_multiple_of": None, "pad_id": tiny_tokenizer.pad_id, "pad_type_id": 0, "pad_token": "[PAD]"}
    values["padding"] = {"strategy": {"Fixed": 12}, "direction": "Right", **pad}
    tokenizer = Tokenizer(json.dumps(values))
    assert tokenizer.encode("the quick brown fox") == tiny_tokenizer.encode("the quick brown fox")
    assert len(tokenizer.encode_training(["the quick brown fox"])[0]) == 4


def test_what_the_file_puts_around_a_text_is_left_out(tiny_tokenizer: Tokenizer) -> None:
    ends = {"cls": ["[CLS]", tiny_tokenizer.cls_id], "sep": ["[SEP]", tiny_tokenizer.sep_id]}
    tokenizer = change(tiny_tokenizer.json, post_processor={"type": "BertProcessing", **ends})
    for text in ("the fox", "café 狐", "the fox " * LONG_TEXT):
        assert tokenizer.encode(text) == tiny_tokenizer.encode(text)
        assert tokenizer.encode_training([text]) == tiny_tokenizer.encode_training([text])


@pytest.mark.parametrize("text", ["[ma\u017fk]", "[mas\u212a]"])
def test_letters_that_only_fold_to_ascii_make_no_mask(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert not any(tiny_tokenizer.encode(text).masked)


def test_tokens_are_written_into_the_text_that_was_encoded(tiny_tokenizer: Tokenizer) -> None:
    encoding = tiny_tokenizer.encode("The  [MASK]!")
    row = encoding.masked.index(True)
    (fox,) = tiny_tokenizer.encode("fox").ids[1:-1]
    assert tiny_tokenizer.write(encoding, {row: fox}) == "The  fox!"
    assert tiny_tokenizer.write(encoding, {}) == "The  [MASK]!"


def test_a_character_of_several_tokens_is_written_whole(tiny_tokenizer: Tokenizer) -> None:
    encoding = Encoding(
        "é한국 x", list(range(40, 47)), [(0, 1), (1, 2), (1, 2), (1, 3), (2, 3), (2, 3), (4, 5)], [False] * 7
    )
    pieces = [tiny_tokenizer.piece(token).removeprefix("##") for token in encoding.ids]
    assert tiny_tokenizer.write(encoding, {0: 50}) == f"{tiny_tokenizer.piece(50)}한국 x"
    for row in range(1, 6):  # one token has parts of both characters, so that none can be written without the others
        assert encoding.with_sharers([row]) == {1, 2, 3, 4, 5}
        changed = [tiny_tokenizer.piece(50) if other == row else pieces[other] for other in range(1, 6)]
        assert tiny_tokenizer.write(encoding, {row: 50}) == f"é{''.join(changed)} x"
