from __future__ import annotations

import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rdt_core import Tokenizer
from tests.training.conftest import Settings
from training import data
from training.config import ConfigError
from training.data import (
    Corpus,
    Vocabulary,
    clean,
    load_corpora,
    load_tokenizer,
    local_corpus,
    make_batch,
    stable_seed,
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


def test_packed_and_several_files_read_as_one_text(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    plain.write_text("the fox\n", encoding="utf-8")
    packed.write_bytes(lzma.compress(b"lazy dog\n"))
    corpus = local_corpus(f"{plain}, {packed}", tiny_tokenizer, tmp_path)
    assert words(tiny_tokenizer, corpus.tokens) == "the fox lazy dog"


def test_a_text_is_tokenised_once(tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the fox\n", encoding="utf-8")
    first = local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")

    def again(*_: object) -> Corpus:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "tokenise", again)
    second = local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.starts, second.starts)
    path.write_text("another fox\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="tokenised again"):
        local_corpus(str(path), tiny_tokenizer, tmp_path / "cache")


def test_a_split_gives_up_the_tail_and_its_starts() -> None:
    corpus = Corpus(np.arange(10, dtype=np.uint16), np.array([0, 4, 8]))
    head, tail = corpus.split(4)
    assert (head.tokens.tolist(), head.starts.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 4])
    assert (tail.tokens.tolist(), tail.starts.tolist()) == ([6, 7, 8, 9], [2])


def test_a_text_of_one_paragraph_has_a_validation_end_too(
    train_settings: Settings, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "one.txt"
    path.write_text("the quick brown fox " * 100, encoding="utf-8")
    config = train_settings(**{"data.dataset_name": str(path)})
    _, validation = load_corpora(config, tiny_tokenizer)
    batches = data.Batches(validation, config, tiny_tokenizer, seed=0)
    for index in range(10):
        assert len(batches[index].targets) % batches[index].length == 0


def test_a_segment_never_runs_over_the_end_of_a_tail(train_settings: Settings, tiny_tokenizer: Tokenizer) -> None:
    corpus = Corpus(np.full(20, 9, dtype=np.uint16), np.array([15]))
    batches = data.Batches(corpus, train_settings(**{"data.full_length_share": 1.0}), tiny_tokenizer, seed=0)
    for index in range(20):
        assert batches[index].targets.view(4, 16)[:, 1:-1].eq(9).all()


def test_validation_text_is_the_end_of_a_local_text_or_a_text_of_its_own(
    train_settings: Settings, tiny_tokenizer: Tokenizer, text_file: Path, tmp_path: Path
) -> None:
    whole = local_corpus(str(text_file), tiny_tokenizer, tmp_path)
    train, validation = load_corpora(train_settings(), tiny_tokenizer)
    assert len(validation) == len(whole) // 10
    assert np.array_equal(np.concatenate([train.tokens, validation.tokens]), whole.tokens)
    other = tmp_path / "other.txt"
    other.write_text("new york " * 20, encoding="utf-8")
    train, validation = load_corpora(train_settings(**{"data.validation_name": str(other)}), tiny_tokenizer)
    assert (len(train), len(validation)) == (len(whole), 40)


def test_texts_that_cannot_be_learnt_from_are_refused(
    train_settings: Settings, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    empty, short, unknown = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "unknown.txt"
    unknown.write_text("<unk> <unk>\n" * 30, encoding="utf-8")
    empty.write_text("\n\n", encoding="utf-8")
    short.write_text("the quick brown fox\n", encoding="utf-8")
    for path, problem in (
        (tmp_path / "none.txt", "no file .*none.txt"),
        (empty, "no text in it"),
        (unknown, "no text in it that this tokenizer knows"),
        (short, "the training text has 4 tokens: want at least data.max_seq_length = 16"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_corpora(train_settings(**{"data.dataset_name": str(path)}), tiny_tokenizer)


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


@pytest.mark.parametrize(("n_paragraphs", "share"), [(1, 0.02), (10, 0.16), (100, 0.5)])
def test_starts_of_paragraphs_are_seen_often_but_not_all_the_time(
    train_settings: Settings, tiny_tokenizer: Tokenizer, n_paragraphs: int, share: float
) -> None:
    """4,000 tokens: the first of a paragraph are 7 and the others 9; segments have 16 tokens with their frame."""
    tokens, starts = np.full(4000, 9, dtype=np.uint16), np.arange(n_paragraphs) * (4000 // n_paragraphs)
    tokens[starts] = 7
    config = train_settings(**{"data.full_length_share": 1.0, "training.batch_size": 32})
    batches = data.Batches(Corpus(tokens, starts), config, tiny_tokenizer, seed=0)
    firsts = torch.cat([batches[index].targets.view(32, 16)[:, 1] for index in range(50)])
    assert (firsts == 7).double().mean().item() == pytest.approx(share, abs=0.05)


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `load_dataset` takes without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, text in (("train", "= Title =\nthe fox\n\na <unk> dog"), ("validation", "new york")):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": text, "id": 1}) + "\n", encoding="utf-8")
    return folder


def test_a_text_comes_through_the_datasets_library(hub_folder: Path, tiny_tokenizer: Tokenizer) -> None:
    corpus = data.hub_corpus(str(hub_folder), "train", tiny_tokenizer)
    assert words(tiny_tokenizer, corpus.tokens) == "the fox a [UNK] dog"
    assert corpus.starts.tolist() == [0, 2]
    validation = data.hub_corpus(str(hub_folder), "validation", tiny_tokenizer)
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
        data.local_corpus(f"{tmp_path / 'good.txt'},{tmp_path / name}", tiny_tokenizer, tmp_path / "cache", "--text")


def test_a_dataset_without_text_or_split_or_at_all_is_refused(hub_folder: Path, tiny_tokenizer: Tokenizer) -> None:
    (hub_folder / "train.jsonl").write_text('{"line": "the fox"}\n', encoding="utf-8")
    (hub_folder / "validation.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"its columns are \['line'\], want 'text'"):
        data.hub_corpus(str(hub_folder), "train", tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"data.dataset_name is .*validation"):
        data.hub_corpus(str(hub_folder), "validation", tiny_tokenizer)


def test_short_hub_names_stand_for_wikitext(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": ["the fox"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("wikitext-2", "wikitext-103", "someone/else"):
        data.hub_corpus(name, "train", tiny_tokenizer)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
        ("someone/else", None, "train"),
    ]


def test_a_tokenizer_is_read_from_json_or_from_a_checkpoint(
    tokenizer_file: Path, tiny_checkpoint: Path, tiny_tokenizer: Tokenizer
) -> None:
    for path in (tokenizer_file, tiny_checkpoint):
        assert load_tokenizer(str(path)).vocab_size == tiny_tokenizer.vocab_size


@pytest.mark.parametrize("name", ["none.json", "none.pt", "bad.json"])
def test_a_tokenizer_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"data.tokenizer_name.*{name}"):
        load_tokenizer(str(tmp_path / name))


def test_batch_k_depends_on_the_seed_and_k_alone(make_batches: Any) -> None:
    one, other = make_batches(seed=1), make_batches(seed=1)
    torch.manual_seed(5)
    late = one[7]
    torch.manual_seed(6)
    for index in range(5):
        other[index]
    for mine, theirs in zip(late, other[7], strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert one[7].targets.tolist() != one[8].targets.tolist()
    assert one[7].targets.tolist() != make_batches(seed=2)[7].targets.tolist()


def test_a_batch_holds_whole_segments_of_one_length(make_batches: Any, tiny_tokenizer: Tokenizer) -> None:
    batches = make_batches(**{"data.full_length_share": 0.0})
    lengths = set()
    for index in range(60):
        batch = batches[index]
        lengths.add(batch.length)
        segments = batch.targets.view(-1, batch.length)
        assert len(segments) == 64 // batch.length == len(batch.start_steps)
        assert segments[:, 0].eq(tiny_tokenizer.cls_id).all()
        assert segments[:, -1].eq(tiny_tokenizer.sep_id).all()
        assert not torch.isin(segments[:, 1:-1], torch.tensor([tiny_tokenizer.cls_id, tiny_tokenizer.sep_id])).any()
        assert batch.packing(torch.device("cpu")).lengths == (batch.length,) * len(segments)
    assert lengths == set(range(6, 17))


@pytest.mark.parametrize(("share", "lengths"), [(1.0, {16}), (0.0, set(range(6, 17)))])
def test_full_length_share_is_the_share_of_full_batches(make_batches: Any, share: float, lengths: set[int]) -> None:
    batches = make_batches(**{"data.full_length_share": share})
    assert {batches[index].length for index in range(60)} == lengths


def test_an_epoch_is_as_many_tokens_as_the_corpus(make_batches: Any) -> None:
    batches = make_batches()
    assert len(batches) == len(batches.corpus) // 64
    assert len(make_batches(**{"training.batch_size": 10_000})) == 1


def test_what_is_visible_is_the_text_and_what_is_masked_is_not(make_batches: Any, tiny_tokenizer: Tokenizer) -> None:
    batches = make_batches()
    for index in range(20):
        batch = batches[index]
        assert torch.equal(batch.tokens[~batch.masked], batch.targets[~batch.masked])
        assert batch.tokens[batch.masked].eq(tiny_tokenizer.mask_id).all()
        assert torch.equal(batch.masked, batch.due_passes > 0)


def test_random_and_kept_tokens_stay_targets(make_batches: Any) -> None:
    batches = make_batches(**{"training.random_token_share": 0.5, "training.keep_token_share": 0.5})
    batch = batches[0]
    assert batch.masked.any()
    assert not torch.equal(batch.tokens, batch.targets)
    assert torch.equal(batch.tokens[~batch.masked], batch.targets[~batch.masked])
    assert batch.tokens[batch.masked].eq(batch.targets[batch.masked]).any()


def test_special_tokens_and_unknown_words_are_never_masked(train_settings: Settings, tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    segment = torch.tensor([t.cls_id, 9, t.unk_id, 10, t.pad_id, 11, t.mask_id, t.sep_id])
    section = train_settings().training
    generator = torch.Generator().manual_seed(0)
    batch = make_batch([segment] * 40, section, Vocabulary.of(t), generator)
    ever = batch.masked.view(40, 8).any(0)
    assert ever.tolist() == [False, True, False, True, False, True, False, False]


@pytest.mark.parametrize("strategy", ["linear", "cosine", "exponential", "random"])
def test_pass_k_reveals_what_the_chain_reveals_at_step_i_minus_k(
    make_batches: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains: list[torch.Tensor] = []
    build = data.masking.chain_masks

    def record(*arguments: Any) -> torch.Tensor:
        chains.append(build(*arguments))
        return chains[-1]

    monkeypatch.setattr(data.masking, "chain_masks", record)
    batch = make_batches(**{"training.masking_strategy": strategy})[3]
    due = batch.due_passes.view(-1, batch.length)
    assert len(set(batch.start_steps.tolist())) > 1
    for chain, start, own in zip(chains, batch.start_steps.tolist(), due, strict=True):
        for n_passes in range(start + 1):
            assert torch.equal(own > n_passes, chain[start - n_passes])


def test_the_first_segments_of_a_batch_are_a_batch(make_batches: Any) -> None:
    batch = make_batches(**{"data.full_length_share": 1.0})[0]
    some = batch.first(2)
    assert torch.equal(some.targets, batch.targets[:32])
    assert torch.equal(some.due_passes, batch.due_passes[:32])
    assert torch.equal(some.start_steps, batch.start_steps[:2])
    assert some.packing(torch.device("cpu")).lengths == (16, 16)
    assert batch.first(99).targets.shape == batch.targets.shape


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(0) == 4761921975702974394
    assert stable_seed(1, 23) == 5444284767772995489
    assert stable_seed(1, 23) != stable_seed(12, 3)
    assert all(0 <= stable_seed(part) < 2**63 for part in range(50))
