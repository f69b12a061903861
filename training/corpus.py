"""From text to one stream of tokens: read from files or a hub, tokenised once, and memory-mapped after that."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rdt_core import checkpoint
from rdt_core.tokenizer import Tokenizer
from training.config import ConfigError, TrainConfig, one_line
from training.files import make_folder, write_whole

HUB_NAMES = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".txt.xz", ".raw.xz", ".tokens.xz")
TEXTS = "local text files, also compressed (.xz), separated by commas"
PARAGRAPHS_A_BLOCK = 4096
MAX_VOCAB_SIZE = 65_536  # ids that uint16 holds
VALIDATION_TOKENS = 50_000
CACHED_AS = 1
"""Raise it with any change of what tokens a text becomes or how they are kept: what was cached before is not read then.
"""

_AT = re.compile(r" @([-,.])@ ")
_ON_A_HUB = re.compile(r"[\w-]+|[\w-][\w.-]*/[\w.-]+|(hf://|buckets/).+")  # name, owner/name


@dataclass(frozen=True)
class Corpus:
    """A text as one stream of token ids, and where its paragraphs start."""

    tokens: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, n_tail: int) -> tuple[Corpus, Corpus]:
        """All but the last `n_tail` tokens, and those."""
        cut = len(self.tokens) - n_tail
        head = Corpus(self.tokens[:cut], self.starts[self.starts < cut])
        return head, Corpus(self.tokens[cut:], self.starts[self.starts >= cut] - cut)


def clean(line: str) -> str:
    """A line of WikiText as ordinary text: ` @-@ ` undone, `<unk>` as `[UNK]`; headings become empty."""
    line = line.strip()
    if line.startswith("= ") and line.endswith(" ="):
        return ""
    return _AT.sub(r"\1", line).replace("<unk>", "[UNK]")


def read_paragraphs(path: Path) -> Iterator[str]:
    """Cleaned, non-empty lines of a text file, compressed (`.xz`) or not, with or without a byte-order mark."""
    utf8 = "utf-8-sig"
    with lzma.open(path, "rt", encoding=utf8) if path.suffix == ".xz" else path.open(encoding=utf8) as lines:
        yield from filter(None, map(clean, lines))


def named_files(names: str) -> list[Path]:
    """The files of a comma-separated setting, in its order."""
    return [Path(name.strip()) for name in names.split(",")]


def shown_files(names: str) -> str:
    """Their names without folders, as a checkpoint or an evaluation records its text."""
    return ",".join(path.name for path in named_files(names))


def shared_files(one: str, other: str) -> list[str]:
    """Names of the files that both settings name."""
    first, second = ({path.resolve() for path in named_files(names)} for names in (one, other))
    return sorted(path.name for path in first & second)


def is_local(names: str) -> bool:
    """Whether files are named, be they there or not."""
    named = any(path.is_file() or path.name.endswith(TEXT_SUFFIXES) for path in named_files(names))
    return named or not may_be_on_a_hub(names.strip())


def may_be_on_a_hub(name: str) -> bool:
    """Whether it is worth asking a hub, which takes half a minute without a network. Its library reads folders, too."""
    return _ON_A_HUB.fullmatch(name) is not None or Path(name).is_dir()


def tokenise(paragraphs: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """One stream of uint16 ids, paragraph after paragraph. Raises `ConfigError` for a vocabulary with more of them."""
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens: want at most {MAX_VOCAB_SIZE}")
    pieces: list[npt.NDArray[np.uint16]] = []
    lengths: list[int] = []
    iterator = iter(paragraphs)
    while block := list(islice(iterator, PARAGRAPHS_A_BLOCK)):
        encoded = [ids for ids in tokenizer.encode_training(block) if ids]
        lengths += map(len, encoded)
        pieces.append(np.fromiter(chain.from_iterable(encoded), dtype=np.uint16))
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    return Corpus(np.concatenate(pieces) if pieces else np.zeros(0, np.uint16), starts)


def local_corpus(names: str, tokenizer: Tokenizer, cache_dir: str | Path, named: str = "data.dataset_name") -> Corpus:
    """Local text files, comma-separated, tokenised once and memory-mapped from `cache_dir` after that.

    Raises `ConfigError`, in which the setting is called `named`.
    """
    paths = named_files(names)
    for path in paths:
        if not path.is_file():
            wanted = f"{path} is a folder, want {TEXTS}" if path.is_dir() else f"no file {path}"
            raise ConfigError(f"{named} is {names!r}: {wanted}")
    key = hashlib.sha256(f"{CACHED_AS}|{tokenizer.json}\n".encode())
    for path in paths:
        stat = path.stat()
        # ctime too: unlike mtime, it cannot be set, which archives and copies do.
        key.update(os.fsencode(path.resolve()))
        key.update(f"|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}\n".encode())
    stem = Path(cache_dir) / key.hexdigest()[:16]
    tokens_file, starts_file = stem.with_suffix(".tokens.npy"), stem.with_suffix(".starts.npy")
    if (kept := _kept(tokens_file, starts_file)) is None:
        make_folder(Path(cache_dir), "data.cache_dir" if named.startswith("data.") else "--cache-dir")
        corpus = tokenise(chain.from_iterable(_readable(path, named) for path in paths), tokenizer)
        if np.isin(corpus.tokens, list(tokenizer.special_ids)).all():
            raise ConfigError(f"{named} is {names!r}: no text in it that this tokenizer knows")
        write_whole(
            {
                tokens_file: lambda file: np.save(file, corpus.tokens),
                starts_file: lambda file: np.save(file, corpus.starts),
            }
        )
        kept = _kept(tokens_file, starts_file)
        assert kept is not None
    return kept


def _readable(path: Path, named: str) -> Iterator[str]:
    try:
        yield from read_paragraphs(path)
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{named} has {path}: cannot be read as UTF-8 text: {error}") from error


def _kept(tokens: Path, starts: Path) -> Corpus | None:
    """The cached corpus; None if there is none that can be read."""
    try:
        return Corpus(np.load(tokens, mmap_mode="r"), np.load(starts))
    except (OSError, EOFError, ValueError):
        return None


def hub_corpus(name: str, split: str, tokenizer: Tokenizer, named: str = "data.dataset_name") -> Corpus:
    """A text dataset through the `datasets` library: a short name, or anything `load_dataset` takes.

    Raises `ConfigError`, in which the setting is called `named`.
    """
    from datasets import load_dataset  # noqa: PLC0415 - heavy, and only for users of a hub

    path, configuration = HUB_NAMES.get(name.strip(), (name.strip(), None))
    try:
        rows = load_dataset(path, configuration, split=split)
    except Exception as error:  # of many kinds: no network, no such dataset, no such split, files it cannot read
        wanted = f"want {TEXTS}, or a dataset with a split {split}"
        raise ConfigError(f"{named} is {name!r}: {wanted}: {one_line(error)}") from error
    if "text" not in rows.column_names:
        raise ConfigError(f"{named} is {name!r}: its columns are {rows.column_names}, want 'text'")
    lines = chain.from_iterable(text.splitlines() for text in rows["text"] if text is not None)
    return tokenise(filter(None, map(clean, lines)), tokenizer)


def load_corpora(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """Training and validation text. Local text without a `validation_name` gives up its end."""
    section = config.data
    of_validation = "the validation text"

    def read(name: str, split: str, named: str) -> Corpus:
        if is_local(name):
            return local_corpus(name, tokenizer, section.cache_dir, named)
        return hub_corpus(name, split, tokenizer, named)

    train = read(section.dataset_name, "train", "data.dataset_name")
    if section.validation_name is not None:
        validation = read(section.validation_name, "validation", "data.validation_name")
    elif is_local(section.dataset_name):
        train, validation = train.split(min(VALIDATION_TOKENS, len(train) // 10))
        of_validation = "the validation text, which is the end of it,"
    else:
        validation = read(section.dataset_name, "validation", "data.dataset_name")
    for text, corpus in (("the training text", train), (of_validation, validation)):
        if len(corpus) < section.max_seq_length:
            wanted = f"want at least data.max_seq_length = {section.max_seq_length}"
            raise ConfigError(f"{text} has {len(corpus)} tokens: {wanted}")
    return train, validation


def load_tokenizer(name: str, named: str = "data.tokenizer_name") -> Tokenizer:
    """A `tokenizer.json`, the one inside a checkpoint (`.pt`), or one by its hub name through `transformers`.

    Raises `ConfigError`, in which the setting is called `named`.
    """
    if Path(name).is_file():
        try:
            return Tokenizer(checkpoint.read(name).tokenizer) if name.endswith(".pt") else Tokenizer.from_file(name)
        except ValueError as error:
            raise ConfigError(f"{named}: {error}") from error
    if name.endswith((".json", ".pt")) or not may_be_on_a_hub(name):
        raise ConfigError(f"{named} is {name!r}: no such file")
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy, and only for users of a hub

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer.to_str())
    except (OSError, ValueError) as error:  # no network, no such tokenizer, none of BERT's kind
        raise ConfigError(f"{named} is {name!r}: {one_line(error)}") from error
