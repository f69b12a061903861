from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdt_core import Tokenizer
from tests.training.conftest import Settings
from training import data
from training.corpus import Corpus, load_corpora
from training.data import Vocabulary, make_batch, stable_seed


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


def test_any_stretch_of_a_text_may_be_drawn_to_its_last_token(
    train_settings: Settings, tiny_tokenizer: Tokenizer
) -> None:
    corpus = Corpus(np.arange(9, 25, dtype=np.uint16), np.array([0]))  # 16 tokens, segments have 14 of them
    batches = data.Batches(corpus, train_settings(**{"data.full_length_share": 1.0}), tiny_tokenizer, seed=0)
    assert {int(batches[index].targets[1]) for index in range(40)} == {9, 10, 11}


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


def test_every_segment_may_be_one_whole_paragraph(train_settings: Settings, tiny_tokenizer: Tokenizer) -> None:
    paragraphs = np.arange(9, 9 + 50, dtype=np.uint16)[:, None] + np.zeros(14, dtype=np.uint16)
    corpus = Corpus(paragraphs.flatten(), np.arange(50) * 14)
    config = train_settings(**{"data.full_length_share": 1.0, "data.start_share": 1.0})
    batches = data.Batches(corpus, config, tiny_tokenizer, seed=0)
    bodies = torch.cat([batches[index].targets.view(4, 16)[:, 1:-1] for index in range(100)])
    assert (bodies == bodies[:, :1]).all()
    assert set(range(9, 9 + 49)) <= set(bodies[:, 0].tolist())  # the last one is drawn rarely


def test_batch_k_depends_on_the_seed_and_k_alone(make_batches: Any) -> None:
    shares = {"training.random_token_share": 0.5, "training.keep_token_share": 0.2}
    one, other = make_batches(seed=1, **shares), make_batches(seed=1, **shares)
    torch.manual_seed(5)
    late = one[7]
    torch.manual_seed(6)
    for index in range(5):
        other[index]
    for mine, theirs in zip(late, other[7], strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert one[7].targets.tolist() != one[8].targets.tolist()
    assert one[7].targets.tolist() != make_batches(seed=2)[7].targets.tolist()


def test_a_batch_may_be_of_one_segment(make_batches: Any) -> None:
    batch = make_batches(**{"training.batch_size": 1, "data.full_length_share": 1.0})[0]
    assert batch.packing(torch.device("cpu")).lengths == (batch.length,) == (16,)


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


def test_other_lengths_are_log_uniform(make_batches: Any) -> None:
    """As many from 6 to 9 as log(10 / 6) is of log(17 / 6), and so on."""
    batches, generator = make_batches(**{"data.full_length_share": 0.0}), torch.Generator().manual_seed(0)
    lengths = np.array([batches._draw_length(generator) for _ in range(10_000)])
    for first, end in ((6, 7), (7, 10), (10, 16), (16, 17)):
        wanted = np.log(end / first) / np.log(17 / 6)
        assert ((first <= lengths) & (lengths < end)).mean() == pytest.approx(wanted, abs=0.015)


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


def test_all_of_a_batch_moves_to_a_device(make_batches: Any) -> None:
    batch = make_batches()[0].to(torch.device("meta"))
    assert {str(x.device) for x in batch if isinstance(x, torch.Tensor)} == {"meta"}
    assert isinstance(batch.length, int)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(0) == 4761921975702974394
    assert stable_seed(1, 23) == 5444284767772995489
    assert stable_seed(1, 23) != stable_seed(12, 3)
    assert all(0 <= stable_seed(part) < 2**63 for part in range(50))
