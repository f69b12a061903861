"""From characters to tokens and back: bounded encoding, masking on request, and writing tokens back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rdt_core.masking import mask_ranks, maskable_rows, masked_at
from rdt_core.tokenizer import CONTINUATION, MASK_TOKEN, Encoding, Fill, Tokenizer, fill
from service.engine.types import Reading, Result
from service.errors import FieldProblem, InvalidArgument, TooLarge, printable
from service.limits import Limits
from service.schema import Candidate, Restored

N_FRAME_TOKENS = 2  # [CLS] and [SEP]


def check_characters(text: str, limits: Limits) -> None:
    """Refuse with `TooLarge`, without tokenising, a text that cannot sensibly fit."""
    if len(text) > limits.max_characters:
        wanted = f"at most {limits.max_characters} characters ({limits.max_seq_len} tokens)"
        raise _too_large(text, f"{len(text)} characters", wanted)


def encode(text: str, tokenizer: Tokenizer, limits: Limits) -> Encoding:
    """Text -> tokens. `TooLarge` names both lengths; `InvalidArgument` if nothing is left to read."""
    encoding = tokenizer.encode(text)
    if len(encoding.ids) > limits.max_seq_len:
        wanted = f"at most {limits.max_seq_len} tokens, with the two that frame every text"
        raise _too_large(text, f"{len(encoding.ids)} tokens", wanted)
    if len(encoding.ids) == N_FRAME_TOKENS:
        wanted = "text with at least one token; spaces and control characters are none"
        raise InvalidArgument.of([FieldProblem.of("text", text, wanted)])
    return encoding


def hide(encoding: Encoding, tokenizer: Tokenizer, ratio: float, seed: int) -> Encoding:
    """Mask a share of the tokens, the same ones for the same seed, and write `[MASK]` in their place in the text. Every
    other token keeps its id, even where the rest of a word alone would be read as another word. Tokens that share
    characters are hidden together, by one mask.
    """
    maskable = maskable_rows(torch.tensor(encoding.ids), tokenizer.special_ids)
    ranks = mask_ranks(maskable, torch.Generator().manual_seed(seed))
    hidden = encoding.with_sharers(masked_at(ranks, ratio).nonzero().squeeze(1).tolist())
    text, ids, spans, masked, read = "", [], [], [], 0
    for row, (start, end) in enumerate(encoding.spans):
        if row not in hidden:
            text += encoding.text[read:end]
            read = max(read, end)
            shift = len(text) - read
            spans.append((start + shift, end + shift))
        elif start >= read:
            text += encoding.text[read:start] + MASK_TOKEN
            read = end
            spans.append((len(text) - len(MASK_TOKEN), len(text)))
        else:  # the mask before it stands for this token, too
            read = max(read, end)
            continue
        ids.append(tokenizer.mask_id if row in hidden else encoding.ids[row])
        masked.append(encoding.masked[row] or row in hidden)
    return Encoding(text + encoding.text[read:], ids, spans, masked)


@dataclass(frozen=True)
class WrittenText:
    """The text with the model's tokens written in, and which characters they are."""

    text: str
    restored: list[Restored]


def write_back(encoding: Encoding, result: Result, tokenizer: Tokenizer) -> WrittenText:
    """Fill the masks, and leave every other character as it was sent.

    Visible tokens that the model was asked for too, and reads differently, are written over, and the others of the same
    character with them.
    """
    place = {row: index for index, row in enumerate(result.rows)}
    text, fills = _written(encoding, {row: result.tokens[row] for row in result.rows}, tokenizer)
    restored = []
    for row, start, end, piece in fills:
        index = place[row]
        candidates = [
            Candidate(tokenizer.piece(token).removeprefix(CONTINUATION), probability)
            for token, probability in result.candidates[index]
        ]
        restored.append(Restored(start, end, piece, result.probabilities[index], result.fixed_at[index], candidates))
    return WrittenText(text, restored)


class Draft:
    """The text of a stream: what a pass has fixed stays, and its guesses are replaced by those of the next pass."""

    def __init__(self, encoding: Encoding, tokenizer: Tokenizer) -> None:
        self._encoding = encoding
        self._tokenizer = tokenizer
        self._fixed: dict[int, int] = {}  # row -> token

    def after(self, reading: Reading) -> str:
        """The text as it stands after one more pass."""
        self._fixed.update((choice.row, choice.token) for choice in reading.chosen)
        guesses = {choice.row: choice.token for choice in reading.guesses}
        return _written(self._encoding, guesses | self._fixed, self._tokenizer)[0]


def _written(encoding: Encoding, tokens: Mapping[int, int], tokenizer: Tokenizer) -> tuple[str, list[Fill]]:
    """The tokens of some rows written into the text, over masks and over what is read differently."""
    rows = {row for row in tokens if encoding.masked[row]}
    if len(tokens) > len(rows):  # some are visible
        rows |= encoding.with_sharers(row for row, token in tokens.items() if _is_reread(encoding, row, token))
    return fill(encoding, {row: tokenizer.piece(tokens[row]) for row in rows})


def _is_reread(encoding: Encoding, row: int, token: int) -> bool:
    start, end = encoding.spans[row]
    return start < end and token != encoding.ids[row]  # [CLS] and [SEP] stand on no characters


def _too_large(text: str, length: str, wanted: str) -> TooLarge:
    message = f"text has {length}: want {wanted}"
    return TooLarge(message, [FieldProblem("text", message, printable(text))])
