"""Prepared models against the plain one, and each row's independence of its neighbours."""

from __future__ import annotations

import copy
import ctypes
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rdt_core import RDT, ModelConfig, Packing, State
from rdt_core import precision as precision_module
from rdt_core.precision import (
    FEW_ROWS,
    FULL_ROWS,
    PRECISIONS,
    BlasLinear,
    Int8Linear,
    PackedLinear,
    Precision,
    SummedLinear,
    _int8_weight_max,
    _linear,
    _packs,
    _prefers_blas,
    _set_products,
    natural_precision,
    prepare,
)
from rdt_core.rows import RowCounts

CONFIGS = {
    "plain": ModelConfig(vocab_size=90, d_model=32, n_heads=4, n_encoder_layers=2, d_ff=64, suppress_tokens=(0, 3)),
    "everything": ModelConfig(
        vocab_size=90, d_model=32, n_heads=2, n_encoder_layers=1, n_prelude_layers=1, d_ff=64, level_conditioning=True,
        decoder_type="transformer", n_decoder_layers=1, suppress_tokens=(0, 3),
    ),
    "as BERT": ModelConfig(
        vocab_size=90, d_model=36, n_heads=4, n_encoder_layers=2, d_ff=64, norm="post", positions="learned",
        decoder_type="dense", suppress_tokens=(0, 3),
    ),
}  # fmt: skip
INT8_BITS = _int8_weight_max().bit_length()  # of a weight's magnitude, and it shows
TOLERANCE: dict[Precision, float] = {  # of the spread of the hidden state
    "fp32": 1e-5, "bf16": 0.03, "int8": 0.12 * 2 ** (7 - INT8_BITS),
}  # fmt: skip
LENGTHS = (5, 9, 3, 9)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> RDT:
    torch.manual_seed(0)
    model = RDT(CONFIGS[request.param]).eval().requires_grad_(False)
    for parameter in model.parameters():  # no weight at its special initial value
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def passes(model: RDT, n: int) -> tuple[State, torch.Tensor]:
    """State after `n` passes, and the logits of its masked rows."""
    generator = torch.Generator().manual_seed(1)
    packing = Packing.of(LENGTHS)
    tokens = torch.randint(4, 90, (packing.n_tokens,), generator=generator)
    masked = torch.rand(packing.n_tokens, generator=generator) < 0.5
    with torch.inference_mode():
        state = model.begin(tokens, masked, packing)
        for _ in range(n):
            state = model(state, packing)
        return state, model.decode(state.hidden, packing, masked.nonzero().squeeze(1))


@pytest.mark.parametrize(("precision", "blas"), [*((precision, False) for precision in TOLERANCE), ("fp32", True)])
def test_a_prepared_model_computes_the_same(
    model: RDT, monkeypatch: pytest.MonkeyPatch, precision: Precision, blas: bool
) -> None:
    monkeypatch.setattr(precision_module, "_prefers_blas", lambda: blas)
    plain, plain_logits = passes(model, 4)
    state, logits = passes(prepare(copy.deepcopy(model), precision), 4)
    for got, wanted in ((state.hidden, plain.hidden), (state.gate.level, plain.gate.level)):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() <= TOLERANCE[precision] * wanted.std(correction=0).clamp(min=0.1)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.isinf(), plain_logits.isinf())
    assert logits.isinf().sum() == 2 * len(logits)
    probabilities, wanted = logits.softmax(-1), plain_logits.softmax(-1)
    assert (probabilities - wanted).abs().max() <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_rounding_shows(model: RDT, precision: Precision) -> None:
    """Or the test above would compare a model with itself."""
    assert not torch.equal(passes(model, 1)[0].hidden, passes(prepare(copy.deepcopy(model), precision), 1)[0].hidden)


def test_int8_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 48))
    rows = torch.randn(7, 64) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0], [7.0], [1e4]])
    together = layer(rows)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in rows]))
    assert torch.isfinite(together).all()


def test_int8_products_have_a_kernel_of_this_processors(capfd: pytest.CaptureFixture[str]) -> None:
    """oneDNN's own reference, which takes whatever has none, is a thousand times as slow."""
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        Int8Linear(nn.Linear(64, 64))(torch.ones(32, 64))
    ctypes.CDLL(None).fflush(None)  # what C has printed is in a buffer of its own
    kernels = re.findall(r",exec,cpu,(?:matmul|inner_product),([^,]+),", capfd.readouterr().out)
    assert kernels
    assert not [kernel for kernel in kernels if kernel.startswith("ref")]


def test_int8_sums_are_exact() -> None:
    """The largest numbers there are: processors that add pairs of products in 16 bits cut them off."""
    linear = _linear(torch.ones(32, 64), torch.zeros(32))
    layer = Int8Linear(linear)
    torch.testing.assert_close(layer(torch.ones(3, 64)), torch.full((3, 32), 64.0))
    torch.testing.assert_close(layer(-torch.ones(3, 64)), torch.full((3, 32), -64.0))


def test_formats_without_kernels_of_their_own_take_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "_packs", lambda dtype: dtype != torch.bfloat16)
    linear, rows = nn.Linear(16, 24), torch.randn(5, 16)
    layer = PackedLinear(linear, torch.bfloat16)
    assert not layer.packed
    torch.testing.assert_close(layer(rows), linear(rows), atol=0.05, rtol=0.05)
    assert PackedLinear(linear, torch.float32).packed


def test_int8_weights_have_a_bit_less_where_sums_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """Rows of 127 by weights of 127, as without VNNI: rows without a sign, two products added first, in 16 bits."""
        of_a_pair = min(2 * 127 * (127 + 128), 2**15 - 1) - 2 * 127 * 128
        return torch.full((len(x), len(x)), x.shape[1] / 2 * of_a_pair)

    monkeypatch.setattr(precision_module, "_int8_product", cut_off)
    least = _int8_weight_max.__wrapped__()
    assert 2 * least * (127 + 128) < 2**15
    assert least == 63, "and no more than the one bit"


def test_int8_weights_have_all_bits_where_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return ((x.float() - 128).sum(1, keepdim=True) * 127).expand(-1, len(x))

    monkeypatch.setattr(precision_module, "_int8_product", exact)
    assert _int8_weight_max.__wrapped__() == 127


def test_int8_rounds_to_a_hundredth() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    rows = torch.randn(32, 256)
    wanted = linear(rows).detach()
    assert ((Int8Linear(linear)(rows) - wanted).square().mean().sqrt() / wanted.std()) < 0.015


def test_gelu_may_be_part_of_a_layer() -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(16, 24), torch.randn(5, 16)
    for plain, active in (
        (PackedLinear(linear, torch.float32), PackedLinear(linear, torch.float32, gelu=True)),
        (BlasLinear(linear), BlasLinear(linear, gelu=True)),
        (Int8Linear(linear), Int8Linear(linear, gelu=True)),
    ):
        torch.testing.assert_close(active(rows), nn.functional.gelu(plain(rows)))


def test_without_onednn(model: RDT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors: fp32 stays as it is, bf16 works, int8 says why not."""
    monkeypatch.setattr(precision_module, "_has_onednn", lambda: False)
    monkeypatch.delattr(precision_module, "_packs")  # it asks oneDNN
    state, logits = passes(model, 2)
    fp32 = prepare(copy.deepcopy(model), "fp32")
    with monkeypatch.context() as decoding:
        decoding.delattr(RDT, "output_bias")  # made of the host's numbers, which a card would wait for
        found = passes(fp32, 2)
    assert torch.equal(found[0].hidden, state.hidden)
    assert torch.equal(found[1], logits)
    bf16 = passes(prepare(copy.deepcopy(model), "bf16"), 2)[0].hidden
    assert (bf16 - state.hidden).abs().max() <= TOLERANCE["bf16"] * state.hidden.std()
    with pytest.raises(ValueError, match="precision is int8: want a CPU with oneDNN"):
        prepare(model, "int8")


def test_an_unknown_precision_is_named(model: RDT) -> None:
    with pytest.raises(ValueError, match="precision is 'fp4': want one of fp32, tf32, bf16, fp16, int8"):
        prepare(model, "fp4")  # type: ignore[arg-type]


def test_which_products_layers_take(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2 alone those of MKL, but for the vocabulary."""
    request.addfinalizer(_prefers_blas.cache_clear)
    for capability, mkl, kind in (
        ("AVX2", True, BlasLinear), ("AVX2", False, PackedLinear), ("AVX512", True, PackedLinear),
        ("DEFAULT", True, PackedLinear),
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda found=mkl: found)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        _prefers_blas.cache_clear()
        prepared = prepare(RDT(CONFIGS["plain"]), "fp32")
        assert isinstance(prepared.inject, kind)
        assert all(isinstance(layer.feed_forward.up, kind) for layer in prepared.encoder)
        assert isinstance(prepared.projection, PackedLinear)
        assert isinstance(prepare(RDT(CONFIGS["plain"]), "bf16").inject, PackedLinear)


@pytest.mark.parametrize("blas", [True, False])
def test_a_text_alone_has_the_digits_it_has_among_others(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, blas: bool
) -> None:
    """Of hidden states, levels, logits and token levels, in fp32 and by one thread."""
    if not _prefers_blas():
        pytest.skip("looked at with AVX2 alone")
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    monkeypatch.setattr(precision_module, "_prefers_blas", lambda: blas)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, d_model=64, n_heads=2, n_encoder_layers=2, d_ff=128, gate_shortlist=32)
    model = prepare(RDT(config))
    lengths = [3, 17, 5, 40, 8, 3, 29, 64]
    tokens = [torch.randint(4, 300, (length,)) for length in lengths]
    masked = [torch.arange(length) % 3 == 1 for length in lengths]

    def computed(which: list[int]) -> list[tuple[torch.Tensor, ...]]:
        packing = Packing.of([lengths[i] for i in which])
        marks = torch.cat([masked[i] for i in which])
        state = model.begin(torch.cat([tokens[i] for i in which]), marks, packing)
        for _ in range(3):
            state = model(state, packing)
        rows = marks.nonzero().squeeze(1)
        n_rows = [int(masked[i].sum()) for i in which]
        logits, doubts = model.decode(state.hidden, packing, rows), model.token_level(state.hidden, packing, rows)
        hidden = state.hidden.split(packing.lengths)
        return list(zip(hidden, state.gate.level, logits.split(n_rows), doubts.split(n_rows), strict=True))

    with torch.inference_mode():
        for i, among_others in enumerate(computed(list(range(len(lengths))))):
            [alone] = computed([i])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone, among_others, strict=True))


@pytest.mark.parametrize(("precision", "counts"), [("fp32", FEW_ROWS), ("bf16", FULL_ROWS)])
def test_few_row_counts_reach_the_kernels(
    model: RDT, monkeypatch: pytest.MonkeyPatch, precision: Precision, counts: RowCounts
) -> None:
    """A kernel is compiled for each; a server that met every number of packed tokens would compile for ever."""
    if precision == "bf16" and not _packs(torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16")
    monkeypatch.setattr(precision_module, "_prefers_blas", lambda: False)  # or the vocabulary alone would be seen
    seen: set[int] = set()
    original = torch.ops.mkldnn._linear_pointwise

    def linear(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.add(len(x))
        return original(x, *rest)

    prepared = prepare(copy.deepcopy(model), precision)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", linear)
    with torch.inference_mode():
        for length in range(1, 70):
            packing = Packing.of([length])
            state = prepared.begin(torch.full((length,), 5), torch.ones(length, dtype=torch.bool), packing)
            prepared.decode(prepared(state, packing).hidden, packing, torch.arange(length))
    assert seen == {counts.holding(n) for n in range(1, 70)}


@pytest.mark.parametrize("precision", sorted(set(PRECISIONS) - set(TOLERANCE)))
def test_formats_of_cuda_are_refused_on_a_cpu(precision: Precision) -> None:
    with pytest.raises(ValueError, match=f"precision is {precision}: want a CUDA device, not cpu"):
        prepare(RDT(CONFIGS["plain"]), precision)


@pytest.mark.parametrize(
    ("precision", "products"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "highest"), ("fp16", "highest")]
)
def test_products_of_a_card_are_as_exact_as_the_format_says(
    precision: Precision, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    flags = SimpleNamespace()
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    _set_products(precision)
    assert told == [products]
    assert flags.allow_bf16_reduced_precision_reduction is False
    assert flags.allow_fp16_reduced_precision_reduction is False


def test_logits_on_a_card_are_not_rounded_to_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    mm, products = torch.mm, []

    def kept(*arguments: Any, **options: Any) -> Tensor:
        products.append(mm(*arguments, **options))
        return products[-1]

    monkeypatch.setattr(torch, "mm", kept)
    with FakeTensorMode():
        linear = _linear(torch.empty(7, 16, device="cuda"), torch.empty(7, device="cuda"))
        logits = SummedLinear(linear, torch.bfloat16)(torch.empty(5, 16, device="cuda"))
    assert (logits.shape, logits.dtype, logits.device.type) == ((5, 7), torch.float32, "cuda")
    assert logits is products[0], "there is no room for two of them"


def test_what_is_left_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert natural_precision(torch.device("cpu")) == "fp32"
    for capability, wanted in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda:1"): capability}.get)
        assert natural_precision(torch.device("cuda:1")) == wanted
    assert RDT(CONFIGS["plain"]).precision == "fp32"
    assert prepare(RDT(CONFIGS["plain"]), "bf16").precision == "bf16"


@pytest.mark.parametrize("packs", [True, False])
def test_a_model_is_prepared_once_and_for_inference(model: RDT, monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """Also where a format needs no preparation."""
    monkeypatch.setattr(precision_module, "_has_onednn", lambda: packs)
    prepared = prepare(model.train().requires_grad_(True))
    assert not prepared.training
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    with pytest.raises(ValueError, match="prepared already, for fp32: load it again"):
        prepare(prepared)
