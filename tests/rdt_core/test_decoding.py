from __future__ import annotations

import torch

from rdt_core.decoding import read_logits, top_first


def test_the_chosen_token_comes_first_among_equals() -> None:
    scores = torch.zeros(50, 300)
    best = torch.arange(50)
    for k in (1, 3, 300):
        values, indices = top_first(scores.clone(), best, k)
        assert torch.equal(indices[:, 0], best)
        assert values.shape == indices.shape == (50, k)
        assert not values.any()
        assert all(len(set(row)) == k for row in indices.tolist())
    assert (scores.topk(3, dim=-1).indices[:, 0] != best).any(), "which it would not by itself"
    few, many = (top_first(scores.clone(), best, k)[1] for k in (3, 20))
    assert torch.equal(few, many[:, :3]), "whoever asks for more beside it"
    assert not torch.equal(scores.topk(3, dim=-1).indices, scores.topk(20, dim=-1).indices[:, :3])
    assert top_first(scores, best, 0)[0].shape == (50, 0)


def test_a_small_vocabulary_has_no_more_candidates_than_tokens() -> None:
    assert top_first(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]), 3)[1].tolist() == [[1, 2, 0]]


def test_tokens_are_ranked_by_their_logits() -> None:
    """However small the differences: of a sure model nearly all probabilities are 0, of a blank one all are equal."""
    spread = torch.linspace(0, 1, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    sure, blank = spread.clone(), spread * 1e-9
    sure[7] += 300.0
    for logits in (sure, blank):
        expected = logits.argsort(descending=True)[:5]
        read = read_logits(logits[None].clone(), top_k=5)
        assert read.tokens.item() == expected[0]
        assert torch.equal(read.top_tokens[0], expected)
        torch.testing.assert_close(read.top_probabilities[0], logits.softmax(-1)[expected])
        torch.testing.assert_close(read.probabilities, read.top_probabilities[:, 0])


def test_probabilities_of_logits_in_half_precision_are_computed_in_full() -> None:
    logits = torch.linspace(0, 4, 300)[None].bfloat16()
    read = read_logits(logits.clone(), top_k=2)
    assert read.probabilities.dtype == read.top_probabilities.dtype == torch.float32
    torch.testing.assert_close(read.probabilities, logits.float().softmax(-1).amax(-1))
