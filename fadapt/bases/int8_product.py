"""Int8 weights: as floats, and in products; with activations rounded to int8 or without.

What :class:`fadapt.bases.int8.Int8` computes, and of which :mod:`fadapt.bases.intx` takes the first
part. The numbers follow ``torchao/quantization/quantize_/workflows/int8/int8_tensor.py``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.bases.op import FrozenLinear, is_batched
from fadapt.bases.precision import gemm_dtype


class Activation(NamedTuple):
    """How the activation is rounded to int8 before the product; the range is symmetric round 0."""

    per_row: bool  # a scale a token, or one for the whole tensor
    asymmetric: bool  # with a zero point
    quant_min: int  # -128, or -64 where torchao's reduce_range is set; -127 in the older tensor
    quant_max: int
    wide_scale: bool  # a float32 scale, or one in x's dtype
    eps: float = torch.finfo(torch.float32).eps  # the smallest scale
    # The product is rounded to the output's dtype before it is scaled by row; or, in the older
    # tensor, to the activation scale's, which is float32 for a float16 x.
    early: bool = True


@dataclass(frozen=True, slots=True)  # not a NamedTuple, which vmap would take apart at every call
class Format:
    """The constants of a product."""

    dtype: torch.dtype  # that W is dequantized to
    result: torch.dtype | None  # to round the product to, or None for that of its scale
    by_value: bool
    asymmetric: bool  # the activation's zero point is not always 0


def _blocks(values: Tensor, scale: Tensor) -> Tensor:
    """``[out, in]`` seen as ``[*scale.shape, elements of a block]``."""
    if scale.shape[0] == 1 and values.shape[0] != 1:
        return values.reshape(1, 1, -1)
    return values.reshape(*scale.shape, -1)


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """W ``[out, in]``, in torchao's order of rounding: the integer in ``dtype``, then the scale."""
    blocks = _blocks(qdata.to(dtype), scale)
    if zero_point is not None:
        blocks = blocks - zero_point.to(dtype).unsqueeze(-1)
    return (blocks * scale.unsqueeze(-1)).to(dtype).reshape(qdata.shape)


def scaled(
    qdata: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What a product multiplies by: W, or without a scale the codes, in one pass on a GPU."""
    if qdata.is_cuda and not torch.compiler.is_compiling():
        from fadapt.kernels import scaled_gpu

        if scaled_gpu.usable(qdata, scale, zero_point, dtype):
            return scaled_gpu.dequantize(qdata, scale, zero_point, dtype)
    return qdata.to(dtype) if scale is None else dequantize(qdata, scale, zero_point, dtype)


def _multiply(
    x: Tensor, static: Format, qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    compute = gemm_dtype(x)
    if static.by_value or zero_point is not None:
        weight = scaled(qdata, scale, zero_point, static.dtype)
        return (x.to(compute) @ weight.to(compute).mT).to(x.dtype)
    return _product(x.to(compute), qdata, 0).mul_(scale.to(compute).flatten()).to(x.dtype)


def _transposed(
    g: Tensor, static: Format, qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    compute = gemm_dtype(g)
    if static.by_value or zero_point is not None:
        weight = scaled(qdata, scale, zero_point, static.dtype)
        return (g.to(compute) @ weight.to(compute)).to(g.dtype)
    return _product(g.to(compute) * scale.to(compute).flatten(), qdata, 1).to(g.dtype)


def _product(x: Tensor, qdata: Tensor, dim: int) -> Tensor:
    """``x @ qdata.T`` (dim 0) or ``x @ qdata`` (dim 1), qdata cast to x's dtype.

    On a CPU in eager mode a large W is cast a block at a time, into one buffer: no large buffer is
    allocated, faulted in and given back at every call, and a short block is still in the cache when
    the product reads it.
    """
    whole = qdata.device.type != "cpu" or torch.compiler.is_compiling() or is_batched(x)
    if not whole:
        rows = x.reshape(-1, x.shape[-1])
        size = qdata.numel() * x.element_size()
        few, limit = len(rows) < 32, 2**24
        # Of few rows the product is short, and so is the block; of many, and in 16 bits, whose
        # product lays W out anew, short blocks cost more than they save; and several threads have
        # too little to share in one (measured on 1024 x 1024 to 4096 x 4096, 1 and 2 threads).
        most = limit
        if x.element_size() > 2 and dim == 0:
            limit = 2**20 if len(rows) <= 8 else 2**22 if few else limit
            most = 2**21 if len(rows) <= 8 else most
        elif x.element_size() > 2:
            alone = torch.get_num_threads() == 1
            limit = 2**21 if not alone else 2**20 if few else 2**22
            most = max(limit, 2**21) if alone else most
        whole = size <= most
    if whole:
        weight = scaled(qdata, None, None, x.dtype)
        return x @ (weight.mT if dim == 0 else weight)
    # Cut between inputs, a sum of products would be rounded once a block.
    cut = 1 if dim == 1 and x.element_size() == 2 else 0
    blocks = qdata.split(max(32, limit // (qdata.shape[1 - cut] * x.element_size())), cut)
    buffer = torch.empty_like(blocks[0], dtype=rows.dtype, memory_format=torch.contiguous_format)
    product = rows.new_empty(rows.shape[0], qdata.shape[dim])
    start = 0
    for block in blocks:
        size = block.shape[cut]
        cast = buffer.narrow(cut, 0, size).copy_(block)
        if dim == cut:
            part = product.narrow(1, start, size)
            torch.mm(rows, cast.mT if dim == 0 else cast, out=part)
        else:
            product.addmm_(rows.narrow(1, start, size), cast, beta=min(start, 1))
        start += size
    return product.reshape(*x.shape[:-1], qdata.shape[dim])


def round_activation(
    x: Tensor, kind: Activation, fixed: Tensor | None, fixed_zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[..., in]`` as int8, with its scale and zero point, each ``[..., 1]``.

    Args:
        x: floating.
        kind: how it is rounded.
        fixed, fixed_zero: the scale and the zero point of a static activation, else None.
    """
    if fixed is not None:
        scale = fixed.reshape(-1)[:1]
        zero = torch.zeros_like(scale) if fixed_zero is None else fixed_zero
        zero = zero.reshape(-1)[:1]
    else:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if not kind.per_row:
            # The zero stands in for the largest element of an empty batch.
            one = [1] * x.dim()
            low = F.pad(low.reshape(-1), (0, 1)).amin().reshape(one)
            high = F.pad(high.reshape(-1), (0, 1)).amax().reshape(one)
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = kind.quant_max - kind.quant_min
        if kind.asymmetric:
            scale = ((high - low) / span).clamp(min=kind.eps)
            zero = (kind.quant_min - (low / scale).round()).clamp(kind.quant_min, kind.quant_max)
        else:
            scale = (torch.maximum(-low, high) / (span / 2)).clamp(min=kind.eps)
            zero = torch.zeros_like(scale)
        if kind.wide_scale or (not kind.early and x.dtype == torch.float16):
            scale = scale.float()
    steps = (x * (1.0 / scale)).round() + zero
    rounded = steps.clamp(kind.quant_min, kind.quant_max).to(torch.int8)
    rows = (*x.shape[:-1], 1)
    return rounded, scale.expand(rows), zero.to(torch.int8).expand(rows)


def exports_integers(x: Tensor) -> bool:
    """Whether a graph is exported for inference: without gradients there is nothing to lose."""
    return (
        torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and x.device.type == "cpu"  # elsewhere _int_mm takes some sizes alone
    )


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 ``a [m, k]`` times int8 ``b [n, k]`` transposed, exactly, as int32 or float64."""
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    usable = a.device.type == "cpu" or (k % 8 == 0 and n % 8 == 0)
    if usable and not is_batched(a):
        if a.device.type == "cpu" or m > 16:
            return torch._int_mm(a.contiguous(), b.t())
        return torch._int_mm(F.pad(a, (0, 0, 0, 32 - m)), b.t())[:m]  # cuBLAS: 17 rows or more
    return a.double() @ b.double().t()  # exact too: |sum| < 2**53


def dynamic(
    x: Tensor,
    static: Format,
    rounded: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    qdata: Tensor,
    scale: Tensor,
) -> Tensor:
    """The product of the integers, scaled; of x only the dtype and the shape count."""
    rows = rounded.reshape(-1, rounded.shape[-1])
    x_scale = x_scale.reshape(-1, 1)
    result = static.result or x_scale.dtype
    if x_scale.dtype == torch.float16:  # whose range the sums may leave
        x_scale = x_scale.float()
    # int8_tensor.py: scaled in the scale's dtype, rounded to the result's, then the weight's scale.
    y = (_int_matmul(rows, qdata).to(x_scale.dtype) * x_scale).to(result)
    if static.asymmetric:
        sums = qdata.sum(-1).to(x_scale.dtype)
        y = y - ((x_zero.reshape(-1, 1).to(x_scale.dtype) * x_scale) * sums).to(result)
    return (y * scale.flatten()).to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


op = FrozenLinear(_multiply, _transposed, rounded=dynamic, n_aux=3)
