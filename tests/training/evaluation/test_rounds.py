"""Mask-predict and ancestral sampling: what may never happen, and what must on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rdt_core import RDT, ModelConfig, Packing, Tokenizer, flops
from rdt_core.model import State
from training.evaluation.measures import per_segment
from training.evaluation.restoring import Evaluation, Outcome, at_depth, cut_segments
from training.evaluation.rounds import ancestral, drawn, least, mask_predict, reveal_probability

LENGTH = 22  # 20 of them words


class Watched(RDT):
    """Notes every text it is begun with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def begin(self, tokens: Tensor, masked: Tensor, packing: Packing) -> State:
        self.seen.append((tokens.clone().view(-1, LENGTH), masked.clone().view(-1, LENGTH)))
        return super().begin(tokens, masked, packing)


class Uniform(Watched):
    """Finds every token equally likely, special ones included."""

    def decode(self, hidden: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:  # noqa: ARG002
        n_rows = len(hidden) if rows is None else len(rows)
        return hidden.new_zeros(n_rows, self.config.vocab_size)


def evaluation_of(model: RDT, tokenizer: Tokenizer, n_segments: int, batch_size: int = 64) -> Evaluation:
    stream = torch.randint(5, tokenizer.vocab_size, ((LENGTH - 2) * n_segments,), generator=torch.Generator())
    segments = cut_segments(stream, tokenizer, LENGTH, at_most=None)
    return Evaluation(model, tokenizer, segments, seed=0, batch_size=batch_size)


@pytest.fixture
def watched(tiny_config: ModelConfig) -> Watched:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Watched(tiny_config).eval().requires_grad_(False)


@pytest.fixture
def evaluation(watched: Watched, tiny_tokenizer: Tokenizer) -> Evaluation:
    return evaluation_of(watched, tiny_tokenizer, n_segments=5)


METHODS = {
    "mask-predict": lambda evaluation: mask_predict(evaluation, 0.5, 4, depth=1),
    "ancestral": lambda evaluation: ancestral(evaluation, 0.5, 4, depth=1),
    "ancestral-greedy": lambda evaluation: ancestral(evaluation, 0.5, 4, depth=1, greedy=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_observed_tokens_are_kept_and_nothing_stays_masked(evaluation: Evaluation, method: str) -> None:
    outcome: Outcome = METHODS[method](evaluation)
    masked = evaluation.masked(0.5)
    model = evaluation.model
    assert isinstance(model, Watched)
    for tokens, hidden in model.seen:
        assert (tokens == evaluation.targets)[~masked].all()
        assert (hidden <= masked).all()
        assert (tokens[hidden] == evaluation.tokenizer.mask_id).all()
    assert len(outcome.scores.guesses) == int(masked.sum())
    assert not (outcome.scores.guesses == evaluation.tokenizer.mask_id).any()
    assert math.isfinite(outcome.scores.nats.sum().item())


@pytest.mark.parametrize("method", [*METHODS, "settle", "fixed"])
def test_the_masks_are_the_same_for_every_method(evaluation: Evaluation, method: str) -> None:
    """The first text a method shows the model, and the order in which it answers."""
    if method == "settle":
        segments = evaluation.settling(0.5, 3).scores.segments
    elif method == "fixed":
        segments = evaluation.depths(0.5, 2)[0].segments
    else:
        segments = METHODS[method](evaluation).scores.segments
    model = evaluation.model
    assert isinstance(model, Watched)
    tokens, masked = model.seen[0]
    assert torch.equal(masked, evaluation.masked(0.5))
    assert torch.equal(tokens, torch.where(masked, evaluation.tokenizer.mask_id, evaluation.targets))
    assert torch.equal(segments, evaluation.masked(0.5).nonzero()[:, 0])


@pytest.mark.parametrize("depth", [1, 3])
def test_one_round_is_one_restoration_at_that_depth(evaluation: Evaluation, depth: int) -> None:
    scores, _ = evaluation.depths(0.5, 3)
    fixed = at_depth(scores, torch.full((5,), depth))
    one_step = ancestral(evaluation, 0.5, 1, depth, greedy=True)
    for outcome in (mask_predict(evaluation, 0.5, 1, depth), one_step):
        assert torch.equal(outcome.scores.guesses, fixed.scores.guesses)
        torch.testing.assert_close(outcome.scores.nats, fixed.scores.nats)
        assert torch.equal(torch.stack(outcome.effort), torch.stack(fixed.effort))


def test_mask_predict_masks_fewer_every_round(evaluation: Evaluation) -> None:
    outcome = mask_predict(evaluation, 0.5, 4, depth=2)
    model = evaluation.model
    assert isinstance(model, Watched)
    assert [masked.sum(1).unique().tolist() for _, masked in model.seen] == [[10], [7], [5], [2]]
    assert outcome.effort.rows.tolist() == [24] * 5
    assert outcome.effort.passes.tolist() == [8] * 5
    config = model.config
    a_round = LENGTH * 2 * flops.pass_flops(config, LENGTH)
    expected = 4 * a_round + 24 * flops.decode_flops(config)
    assert outcome.effort.flops(config, LENGTH).tolist() == [expected] * 5


def test_mask_predict_masks_the_least_confident(evaluation: Evaluation) -> None:
    """After one round those are the rows with the least likely guess."""
    mask_predict(evaluation, 0.5, 2, depth=1)
    model = evaluation.model
    assert isinstance(model, Watched)
    (batch,) = evaluation.slices(0.5)
    state = model(model.begin(batch.tokens, batch.masked, batch.packing), batch.packing)
    confidence = model.decode(state.hidden, batch.packing, batch.rows).softmax(-1).amax(-1).view(5, 10)
    _, again = model.seen[1]
    chosen = again[evaluation.masked(0.5)].view(5, 10)
    for values, remasked in zip(confidence, chosen, strict=True):
        assert values[remasked].max() <= values[~remasked].min()
        assert int(remasked.sum()) == 5


def test_a_token_that_is_written_again_is_as_sure_as_it_was_then(evaluation: Evaluation) -> None:
    """Mask-Predict, word for word, a segment at a time: a confidence is that of the last time a token was written."""
    model, n_rounds = evaluation.model, 4
    found = mask_predict(evaluation, 0.5, n_rounds, depth=1).scores.guesses.view(5, 10)
    (batch,) = evaluation.slices(0.5)
    packing = Packing.of([LENGTH])
    stale = 0
    for segment in range(5):
        rows = batch.masked.view(5, LENGTH)[segment].nonzero().squeeze(1)
        tokens = batch.tokens.view(5, LENGTH)[segment].clone()
        sure, first = torch.zeros(LENGTH), torch.zeros(LENGTH)
        for number in range(n_rounds):
            n_again = len(rows) * (n_rounds - number) // n_rounds
            again = rows[sure[rows].argsort(stable=True)[:n_again]].sort().values
            stale += number > 1 and set(again.tolist()) != set(
                rows[first[rows].argsort(stable=True)[:n_again]].tolist()
            )
            tokens[again] = evaluation.tokenizer.mask_id
            hidden = torch.zeros(LENGTH, dtype=torch.bool).index_fill(0, again, True)
            state = model(model.begin(tokens, hidden, packing), packing)
            sure[again], tokens[again] = model.decode(state.hidden, packing, again).softmax(-1).max(-1)
            first = sure.clone() if number == 0 else first
        assert found[segment].tolist() == tokens[rows].tolist()
    assert stale > 0, "confidences of the first round would have chosen others"


def test_more_rounds_than_masks_leave_out_the_empty_ones(evaluation: Evaluation) -> None:
    """Of 10 masks in 20 rounds, the last round would mask half a token."""
    assert mask_predict(evaluation, 0.5, 20, depth=1).effort.passes.tolist() == [19] * 5


def test_least_takes_the_leftmost_of_equals() -> None:
    values = torch.tensor([[2.0, 1.0, 1.0, math.inf], [3.0, 2.0, 1.0, math.inf]])
    assert least(values, torch.tensor([1, 2])).tolist() == [[False, True, False, False], [False, True, True, False]]


def test_ancestral_sampling_never_changes_what_it_has_revealed(evaluation: Evaluation) -> None:
    outcome = ancestral(evaluation, 0.5, 6, depth=1)
    model = evaluation.model
    assert isinstance(model, Watched)
    texts = [tokens for tokens, _ in model.seen]
    final = evaluation.targets.masked_scatter(evaluation.masked(0.5), outcome.scores.guesses)
    for text, after in zip(texts, [*texts[1:], final], strict=True):
        shown = text != evaluation.tokenizer.mask_id
        assert torch.equal(text[shown], after[shown])
    assert outcome.effort.rows.tolist() == [10] * 5
    assert (outcome.effort.starts <= 6).all()


def test_the_samples_of_a_segment_do_not_depend_on_its_batch(watched: Watched, tiny_tokenizer: Tokenizer) -> None:
    together, alone = (evaluation_of(watched, tiny_tokenizer, 4, batch_size) for batch_size in (4, 1))
    first, second = ancestral(together, 0.5, 3, depth=1), ancestral(alone, 0.5, 3, depth=1)
    assert torch.equal(first.scores.guesses, second.scores.guesses)
    assert torch.equal(torch.stack(first.effort), torch.stack(second.effort))


def test_the_mask_ratio_falls_on_an_even_grid(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    """400 segments of 10 masks in 5 steps: 4000, 3200, 2400, 1600, 800 still masked, within 4.5 deviations."""
    model = Uniform(tiny_config).eval().requires_grad_(False)
    ancestral(evaluation_of(model, tiny_tokenizer, 400, batch_size=400), 0.5, 5, depth=1)
    still_masked = [int(masked.sum()) for _, masked in model.seen]
    assert len(still_masked) == 5
    for step, found in enumerate(still_masked):
        left = 1 - step / 5
        assert abs(found - 4000 * left) <= 4.5 * math.sqrt(4000 * left * (1 - left))


def test_a_uniform_model_is_sampled_uniformly(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    """4000 draws from 85 or so tokens: chi-square within 5 deviations; the greedy variant takes the first always."""
    model = Uniform(tiny_config).eval().requires_grad_(False)
    evaluation = evaluation_of(model, tiny_tokenizer, 400)
    outcome = ancestral(evaluation, 0.5, 3, depth=1)
    n_tokens = tiny_config.vocab_size
    counts = torch.bincount(outcome.scores.guesses, minlength=n_tokens).double()
    expected = 4000 / n_tokens
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (n_tokens - 1)) <= 5 * math.sqrt(2 * (n_tokens - 1))
    assert outcome.scores.nats.mean().item() == pytest.approx(math.log(n_tokens))
    assert ancestral(evaluation, 0.5, 3, depth=1, greedy=True).scores.guesses.unique().tolist() == [0]


def test_draws_follow_the_distribution_and_never_take_what_cannot_be() -> None:
    logits = torch.tensor([[-math.inf, math.log(0.2), math.log(0.8), -math.inf]]).expand(5, 4)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.5, 1 - 2**-24])
    assert drawn(logits, uniform).tolist() == [1, 1, 2, 2, 2]


def test_every_token_is_revealed_by_the_last_step() -> None:
    assert [reveal_probability(step, 4) for step in range(4)] == [1 / 4, 1 / 3, 1 / 2, 1.0]


def test_a_step_that_reveals_nothing_is_not_counted(evaluation: Evaluation) -> None:
    """In 300 steps the 10 masks of a segment are revealed one by one, or two at once if their draws say so."""
    outcome = ancestral(evaluation, 0.5, 300, depth=2)
    assert ((outcome.effort.starts >= 8) & (outcome.effort.starts <= 10)).all()
    assert torch.equal(outcome.effort.passes, 2 * outcome.effort.starts)
    assert per_segment(torch.ones(50), outcome.scores.segments, 5).tolist() == [10] * 5
