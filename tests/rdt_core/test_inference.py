from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdt_core import RDT, Packing, Restoration, State, restore
from rdt_core.halting import due
from tests.rdt_core.conftest import Build
from tests.rdt_core.sequences import random_sequences

quick = settings(max_examples=40)
both_ways = pytest.mark.parametrize("halting", ["gate", "settle"])


def sequence(length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens, masked, _ = random_sequences([length], seed)
    return tokens, masked


def opinionated(model: RDT) -> RDT:
    """With a gate whose levels differ from token to token and from sequence to sequence."""
    for parameter in model.gate.parameters():
        parameter.data.mul_(4)
    return model.eval().requires_grad_(False)


@quick
@given(
    st.integers(0, 1000),
    st.integers(1, 16),
    st.tuples(st.integers(1, 8), st.floats(0, 1)),
    st.sampled_from(["gate", "settle"]),
)
def test_every_mask_is_restored_once_whatever_the_options(
    build: Build, seed: int, length: int, limits: tuple[int, float], halting: Any
) -> None:
    tokens, masked = sequence(length, seed)
    max_steps, threshold = limits
    rows = masked.nonzero().squeeze(1).tolist()
    found = restore(opinionated(build(seed)), tokens, masked, max_steps=max_steps, threshold=threshold, halting=halting)
    assert found.rows == rows
    assert [found.tokens[row] for row in range(length) if row not in rows] == tokens[~masked].tolist()
    assert len(found.probabilities) == len(found.fixed_at) == len(rows)
    assert all(0 < probability <= 1 for probability in found.probabilities)
    assert len(found.levels) == found.steps <= max_steps
    assert found.levels == sorted(found.levels, reverse=True)
    assert 1 <= min(found.fixed_at) <= max(found.fixed_at) <= found.steps
    assert found.reason == "max_steps" or found.levels[-1] < threshold or halting == "settle"
    if halting == "gate":
        assert set(found.fixed_at) == {found.steps}
    else:
        for step in range(1, found.steps + 1):
            assert sum(fixed <= step for fixed in found.fixed_at) >= due(len(rows), step, max_steps)


def test_the_gate_way_is_passes_until_the_level_falls_below_the_threshold_and_one_decoding(build: Build) -> None:
    model = build(3).eval().requires_grad_(False)
    tokens, masked = sequence()
    packing = Packing.of([len(tokens)])
    state, levels = model.begin(tokens, masked, packing), []
    for _ in range(4):
        state = model(state, packing)
        levels.append(state.gate.level.item())
    best = model.decode(state.hidden, packing).softmax(-1).max(-1)
    found = restore(model, tokens, masked, threshold=(levels[2] + levels[3]) / 2, halting="gate", max_steps=8)
    assert (found.steps, found.reason) == (4, "gate")
    assert found.levels == pytest.approx(levels)
    assert found.tokens == torch.where(masked, best.indices, tokens).tolist()
    assert found.probabilities == pytest.approx(best.values[masked].tolist())


def test_settled_tokens_are_seen_by_the_next_pass(build: Build) -> None:
    model = opinionated(build(1))
    tokens, masked = sequence()
    states: list[State] = []
    found = restore(
        model, tokens, masked, halting="settle", threshold=0, max_steps=4,
        observe=lambda _step, _level, state: states.append(state),
    )  # fmt: skip
    assert len(set(found.fixed_at)) > 1
    for row, fixed_at in zip(found.rows, found.fixed_at, strict=True):
        for step, state in enumerate(states, start=1):
            shown = found.tokens[row] if step >= fixed_at else int(tokens[row])
            torch.testing.assert_close(state.embedded[row], model.embed(torch.tensor([shown]))[0])
            assert bool(state.masked[row]) == (step < fixed_at)


def test_the_surest_rows_settle_first(build: Build) -> None:
    model = opinionated(build(1))
    tokens, _ = sequence()
    masked = torch.arange(12) % 2 == 0
    packing = Packing.of([12])
    state = model(model.begin(tokens, masked, packing), packing)
    first = model.token_level(state.hidden, packing, torch.arange(12))
    found = restore(model, tokens, masked, halting="settle", threshold=0, max_steps=3)
    early = [float(first[row]) for row, at in zip(found.rows, found.fixed_at, strict=True) if at == 1]
    late = [float(first[row]) for row, at in zip(found.rows, found.fixed_at, strict=True) if at > 1]
    assert len(early) == due(6, 1, 3)
    assert max(early) <= min(late)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_settle_one_after_the_other_while_there_is_a_choice(build: Build, seed: int) -> None:
    masked = torch.tensor([True] * 5 + [False] * 2 + [True] * 4 + [False])
    found = restore(opinionated(build(seed)), sequence()[0], masked, halting="settle", threshold=0, max_steps=9)
    at = dict(zip(found.rows, found.fixed_at, strict=True))
    assert all(at[row] != at[row + 1] for row in at if row + 1 in at)


def test_threshold_zero_with_gate_runs_to_max_steps(build: Build) -> None:
    found = restore(build().eval(), *sequence(), threshold=0, max_steps=7, halting="gate")
    assert (found.steps, found.reason) == (7, "max_steps")


@pytest.mark.parametrize(("max_steps", "fixed_at"), [(1, [1] * 6), (3, [1, 2, 2, 3, 3, 3]), (7, [1, 3, 4, 5, 6, 7])])
def test_threshold_zero_with_settle_keeps_to_the_pace(build: Build, max_steps: int, fixed_at: list[int]) -> None:
    tokens, masked = sequence()
    assert masked.sum() == 6
    found = restore(build().eval(), tokens, masked, threshold=0, max_steps=max_steps, halting="settle")
    assert (found.steps, found.reason) == (max_steps, "max_steps")
    assert sorted(found.fixed_at) == fixed_at


def test_the_level_of_the_settle_way_is_what_stays_open(build: Build) -> None:
    tokens, masked = sequence()
    found = restore(build(3).eval(), tokens, masked, threshold=0, halting="settle", max_steps=4)
    assert found.levels[-1] == 0.0 < found.levels[-2]
    rows_left = [sum(step > done for step in found.fixed_at) for done in range(1, 5)]
    assert all(level <= left / len(found.rows) for level, left in zip(found.levels, rows_left, strict=True))


def test_a_single_gap_settles_after_its_first_pass(build: Build) -> None:
    masked = torch.arange(12) == 5
    found = restore(build().eval(), sequence()[0], masked, threshold=0, max_steps=7, halting="settle")
    assert (found.steps, found.reason) == (1, "gate")


@both_ways
def test_a_huge_threshold_halts_after_one_pass(build: Build, halting: Any) -> None:
    found = restore(build().eval(), *sequence(), threshold=1e9, max_steps=7, halting=halting)
    assert (found.steps, found.reason) == (1, "gate")


@both_ways
def test_the_same_input_has_the_same_answer(build: Build, halting: Any) -> None:
    model = opinionated(build())
    assert restore(model, *sequence(), halting=halting) == restore(model, *sequence(), halting=halting)


@both_ways
def test_a_text_without_masks_comes_back_after_one_pass(build: Build, halting: Any) -> None:
    tokens, masked = sequence()
    found = restore(build().eval(), tokens, torch.zeros_like(masked), halting=halting)
    assert found == Restoration(tokens.tolist(), [], [], [], [], 1, [0.0], "gate")


@both_ways
def test_decode_all_reads_every_row_and_changes_no_restored_one(build: Build, halting: Any) -> None:
    model = opinionated(build())
    tokens, masked = sequence()
    some, every = (restore(model, tokens, masked, halting=halting, decode_all=flag) for flag in (False, True))
    assert every.rows == list(range(len(tokens)))
    assert [every.tokens[row] for row in some.rows] == [some.tokens[row] for row in some.rows]
    assert [every.fixed_at[row] for row in some.rows] == some.fixed_at
    assert [every.fixed_at[row] for row in every.rows if row not in some.rows] == [every.steps] * int((~masked).sum())


@both_ways
def test_candidates_are_sorted_and_led_by_the_chosen_token(build: Build, halting: Any) -> None:
    found = restore(build().eval(), *sequence(), halting=halting, top_k=5)
    for row, probability, candidates in zip(found.rows, found.probabilities, found.candidates, strict=True):
        assert candidates[0] == (found.tokens[row], probability)
        shares = [share for _, share in candidates]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
    assert not any(restore(build().eval(), *sequence(), halting=halting).candidates), "nobody asked"


@both_ways
def test_out_of_time_answers_with_what_is_there(build: Build, halting: Any) -> None:
    answers = iter([False, True])
    tokens, masked = sequence()
    found = restore(
        build().eval(), tokens, masked, threshold=0, halting=halting, max_steps=20, out_of_time=lambda: next(answers)
    )
    assert (found.steps, found.reason) == (2, "deadline")
    assert found.rows == masked.nonzero().squeeze(1).tolist()


@both_ways
def test_observe_is_called_after_every_pass(build: Build, halting: Any) -> None:
    seen: list[tuple[int, float]] = []
    found = restore(
        build().eval(), *sequence(), threshold=0, max_steps=5, halting=halting,
        observe=lambda step, level, _state: seen.append((step, level)),
    )  # fmt: skip
    assert seen == list(enumerate(found.levels, start=1))
    assert len(seen) == 5


@both_ways
def test_the_defaults_are_the_models_own(build: Build, halting: Any) -> None:
    model = build(max_steps=3, threshold=0.0, halting=halting).eval()
    assert restore(model, *sequence()) == restore(model, *sequence(), max_steps=3, threshold=0.0, halting=halting)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"max_steps": 0}, "max_steps is 0: want a whole number >= 1"),
        ({"max_steps": float("nan")}, "max_steps is nan: want a whole number >= 1"),
        ({"max_steps": True}, "max_steps is True: want a whole number >= 1"),
        ({"threshold": "0.1"}, "threshold is '0.1': want a number"),
        ({"top_k": 1.5}, "top_k is 1.5: want a whole number"),
        ({"threshold": -0.1}, "threshold is -0.1: want a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"halting": "never"}, "halting is 'never': want one of gate, settle"),
        ({"top_k": -1}, "top_k is -1: want a whole number, 0 to vocab_size = "),
        ({"top_k": 10_000}, "top_k is 10000: want a whole number, 0 to vocab_size = "),
    ],
)
def test_an_option_out_of_range_is_refused(tiny_model: RDT, option: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        restore(tiny_model, *sequence(), **option)


@pytest.mark.parametrize("length", [0, 33])
def test_a_sequence_must_fit_the_model(tiny_model: RDT, length: int) -> None:
    tokens = torch.ones(length, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"tokens has length {length}: want 1 to max_seq_len = 32"):
        restore(tiny_model, tokens, tokens.bool())


def test_all_that_is_within_the_bounds_is_restored(build: Build) -> None:
    """The longest sequence, the first and the last token, and a model in training mode that drops nothing out."""
    model = build(dropout=0.0).train()
    tokens = torch.tensor([0, model.config.vocab_size - 1] * (model.config.max_seq_len // 2))
    assert restore(model, tokens, tokens == 0, max_steps=1, threshold=0, top_k=model.config.vocab_size).steps == 1


def test_a_model_restores_by_itself(tiny_model: RDT) -> None:
    options: dict[str, Any] = {"max_steps": 3, "threshold": 0.0, "halting": "settle", "top_k": 2}
    assert tiny_model.inference(*sequence(), **options) == restore(tiny_model, *sequence(), **options)


@pytest.mark.parametrize(
    ("tokens", "masked", "wanted"),
    [
        ([[2, 4]], [[False, True]], "tokens is torch.int64 of shape (1, 2): want int64 or int32 of shape (L,)"),
        ([2.0, 4.0], [False, True], "tokens is torch.float32 of shape (2,)"),
        ([True, False], [False, True], "tokens is torch.bool of shape (2,)"),
        (np.array([2, 4], np.uint16), [False, True], "tokens is torch.uint16 of shape (2,)"),
        ([2, 4], [False, True, True], "masked is torch.bool of shape (3,): want bool of shape (2,)"),
        ([2, 4], [0, 1], "masked is torch.int64 of shape (2,)"),
        ([2, -1], [False, True], "tokens has -1: want 0 <= token < vocab_size = 121"),
        ([0, 121], [False, True], "tokens has 121: want 0 <= token < vocab_size = 121"),
    ],
)
def test_tokens_and_masks_that_are_none_are_named(tiny_model: RDT, tokens: Any, masked: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        restore(tiny_model, torch.tensor(tokens), torch.tensor(masked))


def test_a_model_that_drops_out_is_none_to_ask(build: Build) -> None:
    model = RDT(replace(build().config, dropout=0.1))
    with pytest.raises(ValueError, match=r"training mode and drops out: call eval\(\)"):
        restore(model, *sequence())
    assert restore(model.eval(), *sequence()) == restore(model, *sequence())
