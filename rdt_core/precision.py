"""Number formats for inference: the same model, with its matrix products prepared for the processor.

R: rows   I: inputs of a layer   O: its outputs

    fp32   weights laid out once as the processor's fastest products read them; same arithmetic
    tf32   as fp32, with products of 10-bit fractions; CUDA only, and for the whole process
    bf16   products of bfloat16, summed in float32; the residual stream, norms and the gate stay float32
    fp16   the same with float16: a longer fraction, a smaller range; CUDA only
    int8   weights rounded per output, inputs per row, sums exact in int32; the rest as in fp32; CPU only. Some
           processors (x86 without VNNI) first add two products in 16 bits; there weights have 7 bits, so that
           the sum fits

Levels, and so the decision to halt, are float32 in all formats. With tf32 the gate's few products have short fractions
like all others.

Each row is rounded by itself, never with its neighbours, so on a CPU, with one thread, an answer depends in no format
on what else is in the batch. (The usual dynamic quantisation takes one scale for the whole batch.) With several threads
the last digits may, and on CUDA, where cuBLAS chooses how to add up by the number of rows.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdt_core.layers import FeedForward, SelfAttention, rotary_turns, rotate_pairs
from rdt_core.model import RDT
from rdt_core.rows import SAME_SUMS, RowCounts, same_sums

Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT8_MAX = 127
INT8_ZERO = 128  # of rows, which have no sign
ROW_MULTIPLE = 32
"""oneDNN compiles a kernel for every new number of rows, which takes as long as a pass: so rows come in multiples."""

FULL_ROWS = RowCounts(ROW_MULTIPLE)

FEW_ROWS = RowCounts(ROW_MULTIPLE, finely=True)
"""For fp32. A single short text has few rows, and filled up to 32 its passes take up to twice as long. The other
formats keep to `FULL_ROWS`: int8 gained nothing, and how bf16's kernels for fewer rows round has not been checked."""


def prepare(model: RDT, precision: Precision = "fp32") -> RDT:
    """Make a model ready to serve. Changes it in place, for inference only: its weights cannot be saved afterwards.

    Raises `ValueError` for a format that the model's device does not have, and for a model that was prepared before.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: want one of {', '.join(PRECISIONS)}")
    packs = model.device.type == "cpu" and _has_onednn()
    if precision == "int8" and not packs:
        raise ValueError(f"precision is int8: want a CPU with oneDNN, not {model.device}")
    if precision in ("tf32", "fp16") and model.device.type != "cuda":
        raise ValueError(f"precision is {precision}: want a CUDA device, not {model.device}")
    if model.fixed_shortlist is not None:
        raise ValueError(f"the model has been prepared already, for {model.precision}: load it again")
    model.requires_grad_(False).eval()
    model.precision = precision
    model.fixed_shortlist = model.shortlist
    if model.device.type == "cuda":
        _set_products(precision)
    # The tied output projection as a layer of its own: else its biases would be copied from the host at every decoding.
    vocabulary = _linear(model.embedding.weight, model.output_bias)
    if precision in ("fp32", "tf32") and not packs:
        _replace(model, projection=vocabulary)
        return model
    for module in (*model.prelude.modules(), *model.encoder.modules(), *model.decoder.modules()):
        if isinstance(module, SelfAttention):
            rotary = model.position_embedding is None
            qkv = _ready(_pairs_together(module) if rotary else module.qkv, precision, inner=True)
            _replace(module, qkv=qkv, out=_ready(module.out, precision, inner=True))
            module.rotate = rotate_pairs
        elif isinstance(module, FeedForward):
            _replace(
                module,
                up=_ready(module.up, precision, inner=True, gelu=True),
                activation=nn.Identity(),
                down=_ready(module.down, precision, inner=True),
            )
    model.rotary = rotary_turns
    if packs:
        model.row_counts = _row_counts(precision)
    halves = precision in DTYPES and model.device.type == "cuda"
    projection = SummedLinear(vocabulary, DTYPES[precision]) if halves else _ready(vocabulary, precision, wide=True)
    _replace(model, inject=_ready(model.inject, precision, inner=True), projection=projection)
    if model.decoder_dense is not None:
        _replace(model, decoder_dense=_ready(model.decoder_dense, precision))
    return model


def _set_products(precision: Precision) -> None:
    """How exactly CUDA multiplies, in the whole process."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums are float32 to their end
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def natural_precision(device: torch.device) -> Precision:
    """The format to serve with by default: fp32 costs a factor of two to three on a CPU, of ten and more on CUDA."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"  # before Ampere bf16 is emulated


def _replace(module: nn.Module, **parts: nn.Module) -> None:
    for name, part in parts.items():
        setattr(module, name, part)


def _row_counts(precision: Precision) -> RowCounts:
    """The numbers of rows that the layers run on, on a CPU with oneDNN."""
    if precision != "fp32":
        return FULL_ROWS
    return SAME_SUMS if _prefers_blas() else FEW_ROWS


def _ready(
    linear: nn.Linear, precision: Precision, inner: bool = False, gelu: bool = False, wide: bool = False
) -> nn.Module:
    """The layer in this format. `inner`: its output may keep the format, because it goes into another product or is
    added to float32; else the output is float32. `gelu`: a GELU follows. `wide`: it has far more outputs than inputs.
    """
    if precision == "int8":
        return Int8Linear(linear, gelu)
    if precision == "fp32" and not wide and _prefers_blas():
        return BlasLinear(linear, gelu)
    dtype = DTYPES.get(precision, torch.float32)
    return PackedLinear(linear, dtype, dtype if inner else torch.float32, gelu)


class PackedLinear(nn.Module):
    """A linear layer whose weights were reordered once for oneDNN's kernels; elsewhere an ordinary one.

    Takes rows of any format; computes in `dtype`; gives `out_dtype`.
    """

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32, gelu: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.out_dtype, self.gelu = dtype, out_dtype, gelu
        self.counts = FEW_ROWS if dtype == torch.float32 else FULL_ROWS
        self.packed = linear.weight.device.type == "cpu" and _has_onednn() and _packs(dtype)
        weight = linear.weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(R, I)` -> `(R, O)`"""
        n_rows, x = len(x), x.to(self.dtype)
        if self.packed:
            x, after = self.counts.filled(x), "gelu" if self.gelu else "none"
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], "none")
        else:
            y = F.linear(x, self.weight, self.bias)
            y = F.gelu(y) if self.gelu else y
        return y[:n_rows].to(self.out_dtype)


class BlasLinear(nn.Module):
    """A linear layer in float32 by the BLAS of torch, with its weights transposed, which is faster for few rows."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.weight = linear.weight.detach().float().t().contiguous()  # (I, O)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """`(R, I)` -> `(R, O)`"""
        y = same_sums(self._product, x)
        return F.gelu(y) if self.gelu else y

    def _product(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class SummedLinear(nn.Module):
    """A linear layer on CUDA with products of half precision and the sums as they are, in float32.

    For logits: rounded to the 8 bits of a bfloat16, the two best would often be equal, and the first of them would win.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(dtype)
        self.bias = linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """`(R, I)` -> `(R, O)`"""
        sums = torch.mm(x.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        return sums.add_(self.bias)  # as large as anything in a tick: one of them is enough


class Int8Linear(nn.Module):
    """A linear layer in whole numbers: `y = (x / s_x) (W / s_W)^T`, both rounded, times `s_x s_W`, plus the bias.

    `s_x` is of each row, `s_W` of each output: the largest magnitude there over 127 (symmetric quantisation,
    Jacob et al., 2018). The sums are exact, so the order of summation does not matter.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        weight = linear.weight.detach().float()  # (O, I)
        scale = _largest(weight) / _int8_weight_max()  # (O, 1)
        rounded = (weight / scale).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.weight_scale = scale.squeeze(1)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """`(R, I)` -> `(R, O)`"""
        n_rows, x = len(x), FULL_ROWS.filled(x)
        scale = _largest(x) / INT8_MAX  # (R, 1)
        rounded = (x / scale).round_().add_(INT8_ZERO).to(torch.uint8)
        y = _int8_product(rounded, self.weight, self.weight_scale, self.weight_zero)
        y = torch.addcmul(self.bias, y, scale, out=y)[:n_rows]
        return F.gelu(y) if self.gelu else y


def _int8_product(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor) -> Tensor:
    """Rows `(R, I)` of 1 to 255 for -127 to 127, packed int8 weights -> float32 sums by each output's scale `(R, O)`.

    For rows with a sign oneDNN has no fast kernel where there is AVX-512 without AMX.
    """
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, INT8_ZERO, weight, weight_scale, weight_zero, None, 1.0, 0, torch.float32, "none", [], "none"
    )
    return y


@cache
def _int8_weight_max() -> int:
    """127, or 63 where oneDNN gets sums of products of 127 wrong, because intermediate sums are cut off at 16 bits."""
    rows = torch.full((ROW_MULTIPLE, 64), INT8_ZERO + INT8_MAX, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((ROW_MULTIPLE, 64), INT8_MAX, dtype=torch.int8), None)
    found = _int8_product(rows, weight, torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.int32))
    return INT8_MAX if bool((found == 64 * INT8_MAX**2).all()) else INT8_MAX // 2


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude of each row `(R, I)` -> `(R, 1)`, never 0."""
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # ten times as fast as a norm
    return largest.clamp_(min=torch.finfo(torch.float32).tiny)


def _pairs_together(attention: SelfAttention) -> nn.Linear:
    """The projection with queries and keys reordered for `rotate_pairs`; their products stay the same."""
    qkv = attention.qkv

    def reorder(x: Tensor) -> Tensor:
        """`(3 H C, ...)`: the halves of each query and key are interleaved."""
        split = x.detach().view(3, attention.n_heads, 2, -1, *x.shape[1:])  # (3, H, 2, C/2, ...)
        together = torch.cat((split[:2].transpose(2, 3).reshape(2, -1), split[2].reshape(1, -1)))
        return together.view_as(x)

    return _linear(reorder(qkv.weight), reorder(qkv.bias))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this format on this processor; bfloat16 wants AVX-512 or newer."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(ROW_MULTIPLE, ROW_MULTIPLE, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


@cache
def _prefers_blas() -> bool:
    """With AVX2 and nothing newer, MKL's products take a seventh less time than oneDNN's for tens of rows, except
    onto the vocabulary. And oneDNN's fused GELU adds half to the time of its product, torch's a tenth.
    """
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
