"""The formulas against what torch counts in the model itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rdt_core import Packing, flops
from rdt_core.layers import EncoderLayer, products_attention, rotary_angles
from tests.rdt_core.conftest import Build

LENGTH = 9
PACKING = Packing.of([LENGTH])


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def by_products(query: Tensor, key: Tensor, value: Tensor, _packing: Packing) -> Tensor:
    """`packed_attention` of one sequence; of the fused kernel on a CPU nothing is counted."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return products_attention(q, k, v)[0].transpose(0, 1)


def test_a_layer_costs_its_products_and_rows_that_are_not_read_some_of_them_less(build: Build) -> None:
    config = build().config
    layer = EncoderLayer(config.d_model, config.n_heads, config.d_ff, config.dropout)
    layer.attention.attend = by_products
    hidden, rotary = torch.randn(LENGTH, config.d_model), rotary_angles(PACKING.positions, 8)
    whole = counted(lambda: layer(hidden, PACKING, rotary))
    assert whole == LENGTH * flops.layer_flops(config, LENGTH)
    three = counted(lambda: layer(hidden, PACKING, rotary, None, torch.tensor([1, 4, 5])))
    assert whole - three == (LENGTH - 3) * flops.unread_flops(config)


def test_a_pass_costs_its_layers_and_what_is_fed_back(build: Build) -> None:
    config = build(n_encoder_layers=3).config
    fed_back = counted(lambda: build().inject(torch.randn(1, config.d_model)))
    assert flops.pass_flops(config, LENGTH) == 3 * flops.layer_flops(config, LENGTH) + fed_back


@pytest.mark.parametrize("decoder_type", ["linear", "dense"])
def test_a_row_costs_the_vocabulary_and_what_comes_before_it(build: Build, decoder_type: str) -> None:
    model = build(decoder_type=decoder_type)
    hidden = torch.randn(LENGTH, model.config.d_model)
    found = counted(lambda: model.decode(hidden, PACKING, torch.tensor([1, 4])))
    assert found == 2 * flops.decode_flops(model.config)
    spared = flops.decode_flops(model.config) - flops.shortlist_flops(model.config)
    n_others = model.config.vocab_size - model.config.gate_shortlist
    assert spared == 2 * model.config.d_model * n_others, "the tokens that are not on the shortlist"
    assert flops.shortlist_flops(build(gate_shortlist=0).config) == 0
