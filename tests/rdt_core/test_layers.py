from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rdt_core import Packing
from rdt_core.layers import (
    AdaptiveNorm,
    Condition,
    has_varlen_attention,
    packed_attention,
    padded_attention,
    products_attention,
    rotary_angles,
    rotate,
)
from tests.rdt_core.conftest import Build
from tests.rdt_core.sequences import random_sequences

quick = settings(max_examples=30)


def random_heads(n_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `(T, H, C)` with two heads of four."""
    query, key, value = torch.randn(3, n_tokens, 2, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    return query, key, value


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence, from its formula."""
    weights = (torch.einsum("lhc,mhc->hlm", query, key) / query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hlm,mhc->lhc", weights, value)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_width", "has"),
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((9, 0), torch.float16, 256, True),
        ((8, 6), torch.float32, 64, False),
        ((7, 5), torch.float16, 64, False),
        ((8, 0), torch.bfloat16, 12, False),
        ((8, 0), torch.bfloat16, 264, False),
    ],
)
def test_the_kernel_for_any_lengths_has_its_conditions(
    capability: tuple[int, int], dtype: torch.dtype, head_width: int, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda:1"): capability}.get)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert has_varlen_attention.__wrapped__(torch.device("cuda:1"), dtype, head_width) == has
    assert not has_varlen_attention(torch.device("cpu"), dtype, head_width)


@pytest.mark.parametrize(("has_flash", "hip"), [(False, None), (True, "7.0")])
def test_a_torch_without_the_kernel_has_it_on_no_card(
    has_flash: bool, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert not has_varlen_attention.__wrapped__(torch.device("cuda:1"), torch.bfloat16, 64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_by_products_is_the_fused_one(is_causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(products_attention(q, k, v, is_causal), fused)


def test_training_in_bfloat16_on_a_cpu_attends_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel's backward is several times as slow there; without a gradient it is the faster one."""
    query, key, value = (x.bfloat16().requires_grad_() for x in random_heads(8))
    packing = Packing.of([4, 4])
    with torch.no_grad():
        fused = packed_attention(query.detach(), key, value, packing)
    called = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", called)
    torch.testing.assert_close(packed_attention(query, key, value, packing), fused, atol=0.02, rtol=0.02)
    called.assert_not_called()


@pytest.mark.parametrize("lengths", [[4], [3, 3, 3], [1, 5, 2]], ids=["one", "equal", "mixed"])
def test_packed_attention_is_the_attention_of_each_sequence_alone(lengths: list[int]) -> None:
    query, key, value = random_heads(sum(lengths))
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    alone = torch.cat([softmax_attention(*part) for part in parts])
    torch.testing.assert_close(packed_attention(query, key, value, Packing.of(lengths)), alone)


def test_mixed_and_equal_lengths_agree() -> None:
    query, key, value = random_heads(9)
    batched = packed_attention(query[:8], key[:8], value[:8], Packing.of([4, 4]))
    mixed = packed_attention(query, key, value, Packing.of([4, 4, 1]))
    torch.testing.assert_close(mixed[:8], batched)


@pytest.mark.parametrize(("lengths", "n_calls"), [([4, 4, 4], 1), ([4, 5, 3], 3)])
def test_equal_lengths_share_one_attention_call(
    lengths: list[int], n_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", called)
    packed_attention(*random_heads(12), Packing.of(lengths))
    assert called.call_count == n_calls


@pytest.mark.parametrize("lengths", [[4], [3, 3, 3], [1, 5, 2]], ids=["one", "equal", "mixed"])
def test_padding_is_attended_to_by_nobody(lengths: list[int]) -> None:
    heads, packing = random_heads(sum(lengths)), Packing.of(lengths)
    torch.testing.assert_close(padded_attention(*heads, packing), packed_attention(*heads, packing))
    gradients = []
    for attend in (padded_attention, packed_attention):
        leaves = [x.clone().requires_grad_() for x in heads]
        attend(*leaves, packing).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_on_cuda_mixed_lengths_share_one_call_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", called)
    with FakeTensorMode():  # whose tensors may be said to be on any device
        query, key, value = torch.empty(3, 12, 2, 4, device="cuda").unbind()
        offsets = torch.empty(4, dtype=torch.int32, device="cuda")
        positions, sequence_ids = torch.empty(2, 12, dtype=torch.int64, device="cuda").unbind()
        out = packed_attention(query, key, value, Packing((4, 5, 3), offsets, positions, sequence_ids))
    assert out.shape == (12, 2, 4)
    assert called.call_count == 1


@pytest.mark.parametrize("lengths", [[4, 4], [4, 3, 1]], ids=["equal", "mixed"])
def test_nothing_leaks_between_sequences(lengths: list[int]) -> None:
    query, key, value = random_heads(8)
    before = packed_attention(query, key, value, Packing.of(lengths))
    key[4:], value[4:] = 1e6, -1e6
    after = packed_attention(query, key, value, Packing.of(lengths))
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])


@quick
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_rotary_scores_depend_on_the_distance_alone(first: int, second: int, shift: int) -> None:
    query, key = random_heads(1)[:2]

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned_query = rotate(query, *rotary_angles(torch.tensor([query_at]), 4))
        return (turned_query * rotate(key, *rotary_angles(torch.tensor([key_at]), 4))).sum(-1)

    torch.testing.assert_close(score(first + shift, second + shift), score(first, second), atol=1e-3, rtol=0)


def test_pairs_turn_the_slower_the_later_they_come() -> None:
    """Su et al., 2021, eq. 15: by position x 10000^(-2i/C)."""
    cos, sin = rotary_angles(torch.tensor([0, 3]), 4)
    angles = torch.tensor([[[0.0, 0.0]], [[3.0, 0.03]]])  # (T, 1, C/2)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_rotary_scores_do_depend_on_the_distance() -> None:
    query, key = random_heads(1)[:2]
    far = rotate(key, *rotary_angles(torch.tensor([5]), 4))
    assert not torch.allclose((query * far).sum(-1), (query * key).sum(-1), atol=1e-2)
    torch.testing.assert_close(far.norm(dim=-1), key.norm(dim=-1))


def test_adaptive_norms_start_as_plain_layer_norms(build: Build) -> None:
    norms = [module for module in build(level_conditioning=True).modules() if isinstance(module, AdaptiveNorm)]
    assert norms
    for norm in norms:
        assert norm.modulation is not None
        assert not norm.modulation.weight.any()
        assert not norm.modulation.bias.any()
        x, condition = torch.randn(3, 16), Condition(100 * torch.randn(2, 16), torch.tensor([0, 1, 1]))
        assert torch.equal(norm(x, condition), F.layer_norm(x, (16,)))


def test_norms_are_modulated_once_a_sequence(build: Build) -> None:
    """By what is the same for all of its rows. The projection is as wide as two layers' attention."""
    model = build(level_conditioning=True).eval()
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, AdaptiveNorm) and module.modulation is not None:
            torch.nn.init.normal_(module.modulation.weight, std=0.1)
            module.modulation.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    lengths = [6, 3, 8, 2, 7]
    tokens, masked, packing = random_sequences(lengths)
    state = model(model.begin(tokens, masked, packing), packing)
    assert set(rows) == {len(lengths)}
    parts = zip(tokens.split(lengths), masked.split(lengths), state.hidden.split(lengths), strict=True)
    for own_tokens, own_masked, hidden in parts:
        own = Packing.of([len(own_tokens)])
        alone = model(model.begin(own_tokens, own_masked, own), own).hidden
        torch.testing.assert_close(hidden, alone)


def test_what_modulates_has_the_same_digits_whatever_the_company(build: Build) -> None:
    """At a width that is no multiple of what the processor computes at once, too."""
    model = build(level_conditioning=True, d_model=20).eval()
    seen: list[torch.Tensor] = []
    model.encoder[0].register_forward_pre_hook(lambda _, given: seen.append(given[3].values))
    levels = torch.linspace(0, 1, 40)
    for together in (levels, *levels.split(1)):
        state = model.begin(*(given := random_sequences([2] * len(together))))
        model(state._replace(gate=state.gate._replace(level=together)), given[-1])
    crowd, *alone = seen
    assert torch.equal(torch.cat(alone), crowd)


def test_the_level_matters_only_once_modulation_has_learnt(build: Build) -> None:
    model = build(level_conditioning=True).eval()
    tokens, masked, packing = random_sequences([6])
    high = model.begin(tokens, masked, packing)
    low = high._replace(gate=high.gate._replace(level=torch.full((1,), 0.1)))
    assert torch.equal(model(high, packing).hidden, model(low, packing).hidden)
    for module in model.modules():
        if isinstance(module, AdaptiveNorm) and module.modulation is not None:
            torch.nn.init.normal_(module.modulation.weight, std=0.1)
    assert not torch.allclose(model(high, packing).hidden, model(low, packing).hidden, atol=1e-4)
