from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rdt_core import Tokenizer
from tests.training.conftest import Settings
from training import corpus as module
from training.config import ConfigError
from training.corpus import (
    Corpus,
    clean,
    hub_corpus,
    is_local,
    load_corpora,
    load_tokenizer,
    local_corpus,
    shared_files,
    tokenise,
)


def words(tokenizer: Tokenizer, ids: Any) -> str:
    return " ".join(tokenizer.piece(int(token)) for token in ids)


@pytest.mark.parametrize(
    ("line", "cleaned"),
    [
        (" The co @-@ op sold 1 @,@ 000 at 2 @.@ 5 \n", "The co-op sold 1,000 at 2.5"),
        (" a <unk> fox ", "a [UNK] fox"),
        (" = Valkyria = \n", ""),
        (" = = Plot = = ", ""),
        (" 1 = 1 ", "1 = 1"),
        (" = 2 is what it comes to ", "= 2 is what it comes to"),
        (" the rest = ", "the rest ="),
        ("plain text", "plain text"),
        ("   \n", ""),
    ],
)
def test_wikitext_becomes_ordinary_text(line: str, cleaned: str) -> None:
    assert clean(line) == cleaned


def test_paragraphs_are_one_stream_that_knows_its_starts(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" = Title = \nThe fox\n\nthe lazy <unk> dog\n", encoding="utf-8")
    corpus = local_corpus(str(path), tiny_tokenizer, tmp_path)
    assert words(tiny_tokenizer, corpus.tokens) == "the fox the lazy [UNK] dog"
    assert corpus.starts.tolist() == [0, 2]
    assert len(corpus) == 6


def test_a_byte_order_mark_is_no_part_of_a_heading(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = " = Fox = \nThe dog\n".encode("utf-8-sig")
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text))
    corpus = local_corpus(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt.xz'}", tiny_tokenizer, tmp_path)
    assert words(tiny_tokenizer, corpus.tokens) == "the dog the dog"


def test_packed_and_several_files_read_as_one_text(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    plain.write_text("the fox\n", encoding="utf-8")
    packed.write_bytes(lzma.compress(b"lazy dog\n"))
    corpus = local_corpus(f"{plain}, {packed}", tiny_tokenizer, tmp_path)
    assert words(tiny_tokenizer, corpus.tokens) == "the fox lazy dog"


def test_a_file_may_have_any_name(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also one that is not UTF-8, as an archive may give it, or any with an accent where the locale is none."""
    path = tmp_path / "caf\udce9.txt"
    try:
        path.write_text("the fox\n", encoding="utf-8")
    except OSError:
        pytest.skip("the file system takes no such name")
    assert words(tiny_tokenizer, local_corpus(str(path), tiny_tokenizer, tmp_path).tokens) == "the fox"


def test_a_text_is_tokenised_once(tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the fox\n", encoding="utf-8")
    first = local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")

    def again(*_: object) -> Corpus:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module, "tokenise", again)
    second = local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.starts, second.starts)
    with monkeypatch.context() as changed:
        changed.setattr(module, "CACHED_AS", module.CACHED_AS + 1)  # as where the code has changed
        with pytest.raises(AssertionError, match="tokenised again"):
            local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")
    path.write_text("another fox\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="tokenised again"):
        local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")


def test_a_text_that_only_looks_unchanged_is_tokenised_again(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Archives, copies and checkouts set the time of a file to what they like."""
    path, other = tmp_path / "text.txt", tmp_path / "other.txt"
    path.write_text("the fox\n", encoding="utf-8")
    before = path.stat()
    assert words(tiny_tokenizer, local_corpus(str(path), tiny_tokenizer, tmp_path / "cache").tokens) == "the fox"
    path.write_text("the dog\n", encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert words(tiny_tokenizer, local_corpus(str(path), tiny_tokenizer, tmp_path / "cache").tokens) == "the dog"
    other.write_text("new york", encoding="utf-8")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert words(tiny_tokenizer, local_corpus(str(path), tiny_tokenizer, tmp_path / "cache").tokens) == "new york"


def test_a_split_gives_up_the_tail_and_its_starts() -> None:
    corpus = Corpus(np.arange(10, dtype=np.uint16), np.array([0, 4, 8]))
    head, tail = corpus.split(4)
    assert (head.tokens.tolist(), head.starts.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 4])
    assert (tail.tokens.tolist(), tail.starts.tolist()) == ([6, 7, 8, 9], [2])
    head, tail = corpus.split(6)
    assert (head.starts.tolist(), tail.starts.tolist()) == ([0], [0, 4]), "a paragraph at the cut is the tail's"


def test_a_paragraph_without_a_token_starts_nowhere(tiny_tokenizer: Tokenizer) -> None:
    assert tokenise(["the fox", "\u200b", "dog"], tiny_tokenizer).starts.tolist() == [0, 2]
    assert len(tokenise([], tiny_tokenizer)) == 0


def test_files_in_both_texts_are_the_same_whatever_leads_to_them(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("b.txt")
    assert shared_files(f"{tmp_path}/a.txt,{tmp_path}/b.txt", f"{tmp_path}/link.txt,{tmp_path}/c.txt") == ["b.txt"]


def test_a_file_that_is_there_is_local_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "wikitext-2").write_text("the fox", encoding="utf-8")
    assert is_local(str(tmp_path / "wikitext-2"))


@pytest.mark.parametrize(
    "name",
    [
        *(f"folder/none{kind}{packed}" for kind in (".txt", ".raw", ".tokens") for packed in ("", ".xz")),
        *("none.txt", "none.tx", "./none", "../none", "/none", "~/none", "a/b/none", "one, two"),
    ],
)
def test_what_no_hub_has_is_a_file_that_is_not_there(
    train_settings: Settings, tiny_tokenizer: Tokenizer, name: str
) -> None:
    """A hub without a network is asked for half a minute."""
    assert is_local(name)
    with pytest.raises(ConfigError, match=rf"^data.dataset_name is '{name}': no file {Path(name.partition(',')[0])}$"):
        load_corpora(train_settings(**{"data.dataset_name": name}), tiny_tokenizer)


def test_what_a_hub_may_have_is_no_file(tmp_path: Path) -> None:
    names = (
        "wikitext-2",
        " wikitext-2 ",
        "someone/else",
        "someone/else.v1",
        "hf://datasets/someone/else",
        "buckets/someone/else/it",
    )
    for name in (*names, str(tmp_path)):  # the hub's library reads folders, too
        assert not is_local(name)


def test_validation_text_is_the_end_of_a_local_text_or_a_text_of_its_own(
    train_settings: Settings, tiny_tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    whole = local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    train, validation = load_corpora(train_settings(), tiny_tokenizer)
    assert len(validation) == len(whole) // 10
    assert np.array_equal(np.concatenate([train.tokens, validation.tokens]), whole.tokens)
    other = tmp_path / "other.txt"
    with pytest.raises(ConfigError, match=rf"^data\.validation_name is '{other}': no file {other}$"):
        load_corpora(train_settings(**{"data.validation_name": str(other)}), tiny_tokenizer)
    other.write_text("new york " * 20, encoding="utf-8")
    train, validation = load_corpora(train_settings(**{"data.validation_name": str(other)}), tiny_tokenizer)
    assert (len(train), len(validation)) == (len(whole), 40)


def test_texts_that_cannot_be_learnt_from_are_refused(
    train_settings: Settings, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    empty, short, tenth, unknown = (tmp_path / f"{name}.txt" for name in ("empty", "short", "tenth", "unknown"))
    unknown.write_text("<unk> <unk>\n" * 30, encoding="utf-8")
    empty.write_text("\n\n", encoding="utf-8")
    short.write_text("the quick brown fox\n", encoding="utf-8")
    tenth.write_text("the quick brown fox\n" * 25, encoding="utf-8")
    for path, problem in (
        (tmp_path / "none.txt", "no file .*none.txt"),
        (empty, "no text in it"),
        (unknown, "no text in it that this tokenizer knows"),
        (short, "the training text has 4 tokens: want at least data.max_seq_length = 16"),
        (tenth, "the validation text, which is the end of it, has 10 tokens: want at least data.max_seq_length = 16"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_corpora(train_settings(**{"data.dataset_name": str(path)}), tiny_tokenizer)


def test_a_text_as_long_as_one_segment_can_be_learnt_from(
    train_settings: Settings, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("fox " * 16, encoding="utf-8")
    texts = {"data.dataset_name": str(path), "data.validation_name": str(path)}
    assert list(map(len, load_corpora(train_settings(**texts), tiny_tokenizer))) == [16, 16]


def test_a_tokenizer_of_too_many_words_is_refused(text_file: Path, tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(json="{}", vocab_size=119_547)
    with pytest.raises(ConfigError, match="the tokenizer has 119547 tokens: want at most 65536"):
        local_corpus(str(text_file), tokenizer, tmp_path)


def test_what_a_power_cut_leaves_in_the_cache_is_made_anew(
    text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = local_corpus(str(text_file), tiny_tokenizer, tmp_path).tokens.copy()
    for file in tmp_path.glob("*.npy"):
        file.write_bytes(b"")
    assert np.array_equal(local_corpus(str(text_file), tiny_tokenizer, tmp_path).tokens, whole)


def test_a_cache_without_room_is_named_and_left_clean(
    text_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, _: object) -> None:
        file.write_bytes(b"half")
        raise OSError("21848 requested and 1984 written")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(
        OSError, match=rf"^{tmp_path}/\w+\.tokens\.npy: cannot be written: 21848 requested and 1984 written"
    ):
        local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `load_dataset` takes without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, text in (("train", "= Title =\nthe fox\n\na <unk> dog"), ("validation", "new york")):
        rows = [{"text": text, "id": 1}, {"text": None, "id": 2}]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def test_a_text_comes_through_the_datasets_library(hub_folder: Path, tiny_tokenizer: Tokenizer) -> None:
    corpus = hub_corpus(str(hub_folder), "train", tiny_tokenizer)
    assert words(tiny_tokenizer, corpus.tokens) == "the fox a [UNK] dog"
    assert corpus.starts.tolist() == [0, 2]
    validation = hub_corpus(str(hub_folder), "validation", tiny_tokenizer)
    assert words(tiny_tokenizer, validation.tokens) == "new york"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1")),
        ("cut.txt.xz", lzma.compress(b"the fox " * 1000)[:40]),
        ("no.txt", None),
    ],
)
def test_a_text_that_cannot_be_read_is_named(
    tiny_tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes | None
) -> None:
    (tmp_path / "good.txt").write_text("the quick fox\n", encoding="utf-8")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    wanted = "--text is .*no file .*" if content is None else "--text has [^,]*"  # of the two the one that is bad
    with pytest.raises(ConfigError, match=wanted + name):
        local_corpus(f"{tmp_path / 'good.txt'},{tmp_path / name}", tiny_tokenizer, tmp_path / "cache", "--text")


def test_a_folder_among_files_is_refused(tiny_tokenizer: Tokenizer, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--text is .* is a folder, want local text files"):
        local_corpus(f"{text_file},{tmp_path}", tiny_tokenizer, tmp_path / "cache", "--text")


def test_a_dataset_without_text_or_split_or_at_all_is_refused(hub_folder: Path, tiny_tokenizer: Tokenizer) -> None:
    (hub_folder / "train.jsonl").write_text('{"line": "the fox"}\n', encoding="utf-8")
    (hub_folder / "validation.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"its columns are \['line'\], want 'text'"):
        hub_corpus(str(hub_folder), "train", tiny_tokenizer)
    with pytest.raises(
        ConfigError, match=r"data.dataset_name is .*: want local text .* a split validation: Unknown split"
    ):
        hub_corpus(str(hub_folder), "validation", tiny_tokenizer)


def test_short_hub_names_stand_for_wikitext(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": ["the fox"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("wikitext-2", " wikitext-103", "someone/else "):
        hub_corpus(name, "train", tiny_tokenizer)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
        ("someone/else", None, "train"),
    ]


def test_each_text_may_be_local_or_of_a_hub(
    train_settings: Settings, text_file: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    lines = {("a/hub", "train"): "the quick fox", ("a/hub", "validation"): "new york", ("b/hub", "validation"): "a dog"}

    def load_dataset(path: str, _: str | None, split: str) -> Any:
        return datasets.Dataset.from_dict({"text": [lines[path, split]] * 20})

    def texts(name: str, validation: str | None) -> list[str]:
        config = train_settings(**{"data.dataset_name": name, "data.validation_name": validation})
        return [words(tiny_tokenizer, corpus.tokens[:2]) for corpus in load_corpora(config, tiny_tokenizer)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    local = texts(str(text_file), str(text_file))[0]
    assert texts("a/hub", None) == ["the quick", "new york"]
    assert texts("a/hub", "b/hub") == ["the quick", "a dog"]
    assert texts("a/hub", str(text_file)) == ["the quick", local]
    assert texts(str(text_file), "b/hub") == [local, "a dog"]
    for validation, named in ((None, "dataset_name is 'a/hub'"), ("b/hub", "validation_name is 'b/hub'")):
        del lines[validation or "a/hub", "validation"]
        with pytest.raises(ConfigError, match=rf"data\.{named}"):
            texts("a/hub", validation)


def test_a_tokenizer_is_read_from_json_or_from_a_checkpoint(
    tokenizer_file: Path, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer
) -> None:
    for path in (tokenizer_file, tiny_checkpoint):
        assert load_tokenizer(str(path)).vocab_size == tiny_tokenizer.vocab_size


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.json", "no such file"),
        ("none.pt", "no such file"),
        ("none.jsn", "no such file"),
        ("bad.json", "tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"data.tokenizer_name.*{name}.*{problem}"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("name", ["folder/none.json", "folder/none.pt"])
def test_a_tokenizer_file_that_is_not_there_is_asked_of_no_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.tokenizer_name is '{name}': no such file$"):
        load_tokenizer(name)


def test_a_tokenizer_comes_through_the_transformers_library(
    tokenizer_file: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=f"^data.tokenizer_name is '{tmp_path}': [^\n]*$"):
        load_tokenizer(str(tmp_path))
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file)).save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert found.pieces == tiny_tokenizer.pieces
    assert found.encode("the [MASK] foxes").ids == tiny_tokenizer.encode("the [MASK] foxes").ids
