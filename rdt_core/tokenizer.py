"""BERT WordPiece with character offsets, carried as JSON inside a checkpoint.

Two ways to encode, for two kinds of text:

- `encode` reads what a caller typed. `[MASK]` counts in any letter case; everything else is text, so a
  caller who types `[SEP]` gets those five characters and not a control token.
- `encode_training` reads a corpus, where `[UNK]` stands for a word that nobody knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unicodedata import category, combining

from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.normalizers import Normalizer

MASK = re.compile(r"\[mask\]", re.IGNORECASE | re.ASCII)
CONTINUATION = "##"
MASK_TOKEN = "[MASK]"
NOT_ONE = "\0"
"""Stands for a character that the normalizer removes or turns into several."""
LAST_KEPT = 0xFFFF
"""The last character whose normal form is kept: those beyond are rare, and there are a million of them."""
LONG_TEXT = 500
"""Characters. Longer texts may take long to encode: 8,192 characters without a known word, 0.3 s."""
TRIAL_TEXTS = ("The first word, or 2?", "café 狐 한 🦊 \U00012000")
"""What every tokenizer has to read: a text for either way of `encode`, and characters that few vocabularies know."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", MASK_TOKEN)


@dataclass(frozen=True)
class Encoding:
    """A text as tokens: `ids` and their character spans, `[CLS]` and `[SEP]` (empty spans) included."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    masked: list[bool]

    def with_sharers(self, rows: Iterable[int]) -> set[int]:
        """These rows and those that share a character with one of them: a Korean syllable may be three tokens."""
        together = [(row, row + 1) for row, (one, other) in enumerate(pairwise(self.spans)) if other[0] < one[1]]
        found = set(rows)
        for pair in (*together, *reversed(together)):
            if not found.isdisjoint(pair):
                found.update(pair)
        return found


class Tokenizer:
    """Raises `ValueError` when the JSON is not a tokenizer with BERT's special tokens that can read any text."""

    def __init__(self, definition: str) -> None:
        with _refusal("not a tokenizer JSON"):
            self._corpus = WordPieceTokenizer.from_str(definition)
            self._typed = WordPieceTokenizer.from_str(_as_typed(definition))
            for tokenizer in (self._corpus, self._typed):
                tokenizer.no_truncation()
                tokenizer.no_padding()
            self._normalized = _for_normalized(self._typed)
        self._letters = _Letters(self._typed.normalizer)
        self.json = definition
        vocabulary = self._corpus.get_vocab(with_added_tokens=True)
        self.pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        """The word pieces of all tokens, by id."""
        if [vocabulary[piece] for piece in self.pieces] != list(range(len(vocabulary))):
            raise ValueError(
                f"the tokenizer has {len(vocabulary)} tokens: want ids 0 to {len(vocabulary) - 1}, each once"
            )
        for piece, number in self._typed.get_vocab(with_added_tokens=True).items():
            if vocabulary.get(piece) != number:  # without the control tokens, ids after theirs are lower
                raise ValueError(f"the tokenizer's added token {piece!r} follows a control token: want it before")
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}: not a BERT vocabulary")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocabulary[token] for token in SPECIAL_TOKENS
        )
        with _refusal("the tokenizer cannot read text"):
            self.encode_training(TRIAL_TEXTS)
            only_mask, *_ = [self.encode(text) for text in (MASK_TOKEN, *TRIAL_TEXTS)]
        if only_mask.masked != [False, True, False]:
            raise ValueError("the tokenizer reads [MASK] as text: want it among its added_tokens")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`. `OSError` or `ValueError` naming the file."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # a UnicodeDecodeError is one
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are never masked and never a target: padding, unknown, start, end, mask."""
        return frozenset((self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id))

    def write(self, encoding: Encoding, tokens: Mapping[int, int]) -> str:
        """The encoded text with the tokens of some rows (row -> token) written in, every other character as it was.

        Of a character that is several tokens all are written.
        """
        rows = encoding.with_sharers(tokens)
        return fill(encoding, {row: self.piece(tokens.get(row, encoding.ids[row])) for row in rows})[0]

    def piece(self, token_id: int) -> str:
        """The word piece of a token, with its `##` if it continues a word."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token_id is {token_id}: want 0 <= token_id < {self.vocab_size}")
        return self.pieces[token_id]

    def encode(self, text: str) -> Encoding:
        """What a caller typed, as tokens; offsets count characters of `text` as it was sent."""
        # What is encoded has as many characters as `text` either way, so that offsets count those of `text`.
        if self._normalized is not None and NOT_ONE not in (normal := self._letters.normalize(text)):
            tokenizer, seen = self._normalized, normal
        else:
            tokenizer, seen = self._typed, MASK.sub(MASK_TOKEN, text)
        if len(seen) > LONG_TEXT:  # a batch lets other threads run meanwhile, which costs more than a few words take
            (encoded,) = tokenizer.encode_batch([seen], add_special_tokens=False)
        else:
            encoded = tokenizer.encode(seen, add_special_tokens=False)
        ids = [self.cls_id, *encoded.ids, self.sep_id]
        offsets = encoded.offsets
        if tokenizer is self._typed and not text.isascii():
            offsets = _with_accents(text, encoded.ids, offsets, self.mask_id)
        spans = [(0, 0), *offsets, (len(text), len(text))]
        return Encoding(text, ids, spans, [token == self.mask_id for token in ids])

    def encode_training(self, texts: Sequence[str]) -> list[list[int]]:
        """Corpus texts as token ids, without `[CLS]` and `[SEP]`; `[UNK]` in the text is `[UNK]`."""
        encodings = self._corpus.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, for reading: pieces joined, special tokens left out."""
        kept = [token_id for token_id in token_ids if token_id not in self.special_ids]
        return str(self._corpus.decode(kept))


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Raises `ValueError` for what the library raises: bare `Exception`, or where its Rust panics, not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def _as_typed(definition: str) -> str:
    """The tokenizer for typed text: `[MASK]` is a token wherever it stands, and any other control token is text."""
    fields = json.loads(definition)
    fields["added_tokens"] = [
        token | {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        if token["content"] == MASK_TOKEN
        else token
        for token in fields["added_tokens"]
        if token["content"] == MASK_TOKEN or not token["special"]
    ]
    return json.dumps(fields)


def _for_normalized(typed: WordPieceTokenizer) -> WordPieceTokenizer | None:
    """The same tokenizer without its normalizer, for text that is normalized already, which takes half the time.

    None where normalizing first would change what is read.
    """
    fields = json.loads(typed.to_str())
    if fields["normalizer"] is None or fields["normalizer"]["type"] != "BertNormalizer":
        return None  # others may not take each character by itself
    if not fields["normalizer"]["lowercase"]:
        return None  # accents would come off letters that then read [MASK]
    if [token["content"] for token in fields["added_tokens"]] != [MASK_TOKEN]:
        return None  # some may be looked for in normalized text
    return WordPieceTokenizer.from_str(json.dumps(fields | {"normalizer": None}))


def _with_accents(
    text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], mask_id: int
) -> list[tuple[int, int]]:
    """Spans that take in the accents on their last characters, which the normalizer has dropped: otherwise they would
    stay where the rest of a word is hidden or written over. A mask has none.
    """
    starts = {start for start, _ in spans}
    accented = []
    for token, (start, end) in zip(ids, spans, strict=True):
        after = end
        while token != mask_id and after < len(text) and after not in starts and category(text[after]) == "Mn":
            after += 1
        accented.append((start, after))
    return accented


class _Letters(dict[int, str]):
    """What BERT's normalizer makes of each character where that is one character, else `NOT_ONE`.

    It takes each character by itself: lowers it, strips its accent, drops it, or puts spaces around it. The exception
    is combining accents, which it reorders: they are `NOT_ONE`. The normalizer is asked once for each character.
    """

    def __init__(self, normalizer: Normalizer | None) -> None:
        self._normalizer = normalizer

    def __missing__(self, code: int) -> str:
        if self._normalizer is None or code > LAST_KEPT:
            return NOT_ONE
        normal = self._normalizer.normalize_str(chr(code))
        self[code] = normal if len(normal) == 1 and not combining(chr(code)) else NOT_ONE
        return self[code]

    def normalize(self, text: str) -> str:
        """As many characters as `text` has, with masks as `[MASK]`."""
        if text.isascii():
            return MASK.sub(MASK_TOKEN, text.translate(self))
        # Masks first: normalizing turns some other letters into those of [MASK].
        return MASK_TOKEN.join(part.translate(self) for part in MASK.split(text))


class Fill(NamedTuple):
    """A piece written into a text: characters `start:end` of the new text are `text`."""

    row: int
    start: int
    end: int
    text: str


def fill(encoding: Encoding, pieces: Mapping[int, str]) -> tuple[str, list[Fill]]:
    """Write pieces over the spans of some rows and leave every other character as it was sent.

    A `##` piece is written without its mark. Where two masks stand with nothing between them and the
    second is filled with a new word, a space separates the two.
    """
    out: list[str] = []
    fills: list[Fill] = []
    length = read = 0
    last_row_end = -1
    for row in sorted(pieces):
        start, end = encoding.spans[row]
        before = encoding.text[read:start]
        word = pieces[row].removeprefix(CONTINUATION)
        adjacent_masks = start == last_row_end and encoding.masked[row] and encoding.masked[row - 1]
        if adjacent_masks and not pieces[row].startswith(CONTINUATION):
            before += " "
        out += [before, word]
        length += len(before)
        fills.append(Fill(row, length, length + len(word), word))
        length += len(word)
        read = last_row_end = end
    out.append(encoding.text[read:])
    return "".join(out), fills
