from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt_core import masking
from rdt_core.masking import SCHEDULES, chain_masks, corrupt, mask_ranks, maskable_rows, masked_at

quick = settings(max_examples=40)
fractions = st.floats(0, 1)
curves = st.builds(masking.schedule, st.sampled_from(sorted(SCHEDULES)), st.integers(0, 1000))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quick
@given(curves, fractions, fractions)
def test_a_schedule_rises_from_clean_to_all_masked(curve: masking.Schedule, first: float, second: float) -> None:
    assert (curve(0.0), curve(1.0)) == (0.0, 1.0)
    assert 0.0 <= curve(min(first, second)) <= curve(max(first, second)) <= 1.0


@quick
@given(curves, fractions)
def test_a_schedule_is_a_pure_function(curve: masking.Schedule, fraction: float) -> None:
    before = torch.get_rng_state()
    assert curve(fraction) == curve(fraction)
    assert torch.equal(torch.get_rng_state(), before)


def test_schedules_at_the_middle() -> None:
    assert masking.schedule("linear")(7 / 20) == 7 / 20
    assert masking.schedule("cosine")(0.5) == pytest.approx(0.5**0.5)
    assert masking.schedule("exponential")(0.5) == pytest.approx(0.1824, abs=1e-4)
    assert 0.25 <= masking.random(0.5, seed=3) <= 0.5**0.5


def test_the_powers_of_random_schedules_lie_between_a_half_and_two() -> None:
    powers = [math.log2(math.log(masking.random(0.5, seed)) / math.log(0.5)) for seed in range(200)]
    assert -1.0 <= min(powers) < -0.9
    assert 0.9 < max(powers) <= 1.0
    assert abs(sum(powers)) / 200 < 0.15


def test_the_random_schedule_is_another_for_another_seed() -> None:
    assert masking.schedule("random", 3)(0.5) == masking.random(0.5, 3)
    assert len({masking.schedule("random", seed)(0.5) for seed in range(20)}) == 20


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="masking_strategy is 'sine': want one of linear, cosine"):
        masking.schedule("sine")


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 20), curves, st.integers(0, 1000))
def test_chains_are_nested_and_spare_special_tokens(
    tokens: list[int], n_steps: int, curve: masking.Schedule, seed: int
) -> None:
    special = {0, 1, 2}
    maskable = maskable_rows(torch.tensor(tokens), special)
    assert maskable.tolist() == [token not in special for token in tokens]
    masks = chain_masks(mask_ranks(maskable, seeded(seed)), n_steps, curve)
    assert masks.shape == (n_steps + 1, len(tokens))
    assert not masks[0].any()
    assert torch.equal(masks[-1], maskable)
    assert (masks[:-1] <= masks[1:]).all()


@quick
@given(st.integers(1, 60), st.integers(1, 20))
def test_step_k_of_n_of_a_linear_chain_masks_k_in_n_tokens(n_tokens: int, n_steps: int) -> None:
    ranks = mask_ranks(torch.ones(n_tokens, dtype=torch.bool), seeded(0))
    counts = chain_masks(ranks, n_steps).sum(1).tolist()
    assert counts == [-(-n_tokens * step // n_steps) for step in range(n_steps + 1)]


def test_the_order_of_masking_comes_from_the_generator() -> None:
    maskable = torch.ones(50, dtype=torch.bool)
    assert torch.equal(mask_ranks(maskable, seeded(1)), mask_ranks(maskable, seeded(1)))
    assert not torch.equal(mask_ranks(maskable, seeded(1)), mask_ranks(maskable, seeded(2)))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"ratio is {ratio}: want 0 <= ratio <= 1"):
        masked_at(torch.zeros(3), ratio)


def test_corrupt_writes_masks_and_nothing_else() -> None:
    masked = torch.tensor([True, False, True, False])
    assert corrupt(torch.tensor([7, 8, 9, 4]), masked, 4).tolist() == [4, 8, 4, 4]


@pytest.mark.parametrize(("random_share", "keep_share"), [(0.1, 0.1), (0.3, 0.05)], ids=["as BERT", "others"])
def test_of_masked_rows_a_share_is_random_and_a_share_is_kept(random_share: float, keep_share: float) -> None:
    tokens = torch.full((20_000,), 7)
    masked = torch.arange(20_000) % 2 == 0
    corrupted = corrupt(
        tokens, masked, 4, vocab_size=1000, random_share=random_share, keep_share=keep_share, generator=seeded(0)
    )
    assert torch.equal(corrupted[~masked], tokens[~masked])
    seen = corrupted[masked]
    shares = torch.stack([(seen == 4), (seen == 7), (seen != 4) & (seen != 7)]).double().mean(1)
    wanted = torch.tensor([1 - random_share - keep_share, keep_share, random_share]).double()
    torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)
    assert len(seen.unique()) > 500
    assert seen.max() < 1000


def test_what_is_random_comes_from_the_generator() -> None:
    def drawn(seed: int) -> list[int]:
        tokens, masked = torch.arange(100), torch.ones(100, dtype=torch.bool)
        shares = {"random_share": 0.4, "keep_share": 0.3}
        return corrupt(tokens, masked, 500, vocab_size=400, generator=seeded(seed), **shares).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(("random_share", "keep_share"), [(-0.1, 0.0), (0.0, -0.1), (0.6, 0.5)])
def test_impossible_shares_are_refused(random_share: float, keep_share: float) -> None:
    with pytest.raises(ValueError, match=f"random_share is {random_share}, keep_share is {keep_share}"):
        corrupt(torch.tensor([7]), torch.tensor([True]), 4, random_share=random_share, keep_share=keep_share)


def test_random_tokens_want_a_vocabulary() -> None:
    tokens, masked = torch.arange(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        masking.corrupt(tokens, masked, 103, random_share=0.1, keep_share=0.1)
    assert torch.equal(masking.corrupt(tokens, masked, 103, keep_share=1.0), tokens)
    with pytest.raises(ValueError, match="random_share is nan"):
        masking.corrupt(tokens, masked, 103, vocab_size=9, random_share=float("nan"))


def test_a_chain_has_a_step() -> None:
    with pytest.raises(ValueError, match="n_steps is 0: want >= 1"):
        masking.chain_masks(torch.rand(4), 0)
