from __future__ import annotations

import pytest
import torch
from torch import nn

from rdt_core.precision import FEW_ROWS, FULL_ROWS
from rdt_core.rows import SAME_SUMS, RowCounts, few_outputs, same_sums


def test_row_counts() -> None:
    fine, plain = FEW_ROWS, FULL_ROWS
    assert [fine.holding(n) for n in (0, 1, 7, 8, 9, 17, 33, 65, 129, 257)] == [1, 1, 7, 8, 10, 20, 40, 80, 160, 288]
    assert all(n <= fine.holding(n) <= max(n, 1.25 * n) for n in range(1, 600)), "at most a quarter is dead"
    assert len({fine.holding(n) for n in range(1, 513)}) == 36, "kernels to compile"
    assert [plain.holding(n) for n in (1, 32, 33)] == [32, 32, 64]
    assert [RowCounts().holding(n) for n in (0, 1, 2, 33)] == [1, 1, 2, 33]
    assert [SAME_SUMS.holding(n) for n in (0, 1, 4, 33)] == [4, 4, 4, 33]
    assert torch.equal(fine.filled(torch.ones(9, 2)), torch.tensor([1.0] * 9 + [0.0])[:, None].expand(10, 2))


@pytest.mark.parametrize("n_rows", [0, 1, 3, 4, 9])
def test_dead_rows_are_not_seen(n_rows: int) -> None:
    layer, rows = nn.Linear(5, 7), torch.randn(n_rows, 5)
    given: list[int] = []
    layer.register_forward_pre_hook(lambda _, inputs: given.append(len(inputs[0])))
    torch.testing.assert_close(same_sums(layer, rows), nn.functional.linear(rows, layer.weight, layer.bias))
    assert given == [max(4, n_rows)]


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_few_outputs_are_those_of_the_layer(n_outputs: int) -> None:
    layer, rows = nn.Linear(64, n_outputs), torch.randn(37, 64)
    found = few_outputs(layer, rows)
    torch.testing.assert_close(found, layer(rows).double(), atol=1e-6, rtol=1e-5)
    for n_rows in range(1, 37):
        assert torch.equal(few_outputs(layer, rows[:n_rows]), found[:n_rows])
