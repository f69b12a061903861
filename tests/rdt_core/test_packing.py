from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt_core import Packing, pack, unpack
from rdt_core.packing import rows_of, sequence_sum, to_device

quick = settings(max_examples=40)
some_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def numbered(lengths: list[int]) -> list[torch.Tensor]:
    """Sequences whose every entry is another number."""
    return list(torch.arange(2 * sum(lengths)).view(-1, 2).split(lengths))


@quick
@given(some_lengths)
def test_unpack_undoes_pack(lengths: list[int]) -> None:
    sequences = numbered(lengths)
    for before, after in zip(sequences, unpack(*pack(sequences)), strict=True):
        assert torch.equal(before, after)


def test_the_layout_lies_where_the_sequences_do() -> None:
    _, packing = pack([torch.zeros(2, device="meta")])
    assert {values.device.type for values in (packing.offsets, packing.positions, packing.sequence_ids)} == {"meta"}


@quick
@given(some_lengths, st.data())
def test_rows_are_those_of_the_named_sequences_in_the_named_order(lengths: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    sequences = numbered(lengths)
    expected, _ = pack([sequences[i] for i in keep])
    packed, packing = pack(sequences)
    assert torch.equal(packed[rows_of(packing, keep)], expected)


def test_the_layout_of_three_sequences() -> None:
    packing = Packing.of([3, 2, 4])
    assert packing.offsets.tolist() == [0, 3, 5, 9]
    assert packing.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert packing.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert (packing.n_sequences, packing.n_tokens, packing.equal_lengths) == (3, 9, False)
    assert packing.offsets.dtype == torch.int32
    assert packing.longest == 4
    assert Packing.of([4, 4]).equal_lengths


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_empty_sequences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="want at least one sequence, each of length >= 1"):
        Packing.of(lengths)


def test_no_sequences_are_refused_too() -> None:
    with pytest.raises(ValueError, match="want at least one sequence"):
        pack([])


@quick
@given(some_lengths, st.integers(0, 1000))
def test_a_sequence_sums_to_the_same_digits_alone_and_among_others(lengths: list[int], seed: int) -> None:
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    sums = sequence_sum(rows, Packing.of(lengths))
    for own_sum, own_rows in zip(sums, rows.split(lengths), strict=True):
        assert torch.equal(own_sum, sequence_sum(own_rows, Packing.of([len(own_rows)]))[0])
        torch.testing.assert_close(own_sum, own_rows.sum(0))


def test_rows_after_the_last_sequence_are_not_summed() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0], [math.nan]])
    assert sequence_sum(rows, Packing.of([2, 1])).tolist() == [[3.0], [4.0]]


def test_what_goes_to_a_card_goes_by_pinned_memory_and_is_not_waited_for() -> None:
    values = Mock(spec=torch.Tensor)
    to_device(values, "cuda:1")
    values.pin_memory.return_value.to.assert_called_once_with("cuda:1", non_blocking=True)
    stays = torch.arange(3)
    assert to_device(stays, "cpu") is stays
    assert to_device(stays, None) is stays
