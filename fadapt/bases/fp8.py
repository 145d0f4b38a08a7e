"""What the FP8 formats share: a scaled float8 weight, and an activation rounded to float8 too.

``y = Q(x) W``, ``W = codes * scale``, ``Q(x) = float8(clamp(x / xs, -limit, limit)) * xs``. Its
derivative is that of ``clamp(x) W``: straight through the rounding, zero where x is clipped, in
the dtype of the product (a gradient that is itself cast to float8 vanishes below 2**-10).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fadapt.bases.grid import Grid
from fadapt.bases.op import FrozenLinear, is_batched
from fadapt.bases.precision import gemm_dtype
from fadapt.bases.widen import widen


@dataclass(frozen=True, slots=True)
class Format:
    """The constants of a product: what W and y are rounded to, and where the product runs."""

    dtype: torch.dtype  # that W is dequantized to
    result: torch.dtype  # that of y
    native: bool = False  # multiply in that dtype even where the CPU only emulates it: INC's bits
    scaled: bool = False  # y from the codes of x and W (torch._scaled_mm), not from Q(x) and W
    one: bool = False  # one scale for all of x


@dataclass(frozen=True, slots=True)
class Rounding:
    """How an activation is rounded.

    Attributes:
        kind: the float8 dtype.
        limit: the largest magnitude that the device keeps: 448, or 240 on Gaudi 2, for e4m3.
        result: the dtype that the rounded activation is given back in.
    """

    kind: torch.dtype
    limit: float
    result: torch.dtype


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W ``[out, in]``: codes times scale in float32, rounded once to ``dtype``."""
    return widen(codes, scale, dtype)


def _weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.is_cuda and not torch.compiler.is_compiling():
        from fadapt.kernels import scaled_gpu

        if scaled_gpu.usable(codes, scale, None, dtype):
            return scaled_gpu.dequantize(codes, scale, None, dtype)
    return dequantize(codes, scale, dtype)


def grid(scale: Tensor, kind: torch.dtype, limit: float) -> Grid:
    """The grid of float8 codes; a fresh scale is amax / limit."""
    return Grid(scale, None, kind, -limit, limit, limit)


def cast(x: Tensor, scale: Tensor, how: Rounding, inverse: Tensor | None = None) -> Tensor:
    """x as float8 codes, in float32; differentiable straight through the rounding.

    Args:
        x: ``[..., in]``, floating.
        scale: what a code stands for; broadcasts over x.
        how: to what.
        inverse: multiplied with instead of dividing by ``scale``; in x's own dtype, as a Gaudi
            does.
    """
    steps = _steps(x, scale, inverse)
    still = steps.detach()
    codes = still.clamp(-how.limit, how.limit).to(how.kind).float()
    through = torch.where(_inside(still, how), steps, codes)
    # Exact: a float and its rounding are within a factor of two, so their difference has no error.
    return through + (codes - through.detach())


def _steps(x: Tensor, scale: Tensor, inverse: Tensor | None) -> Tensor:
    return x.float() / scale if inverse is None else (x * inverse.to(x.dtype)).float()


def _inside(steps: Tensor, how: Rounding) -> Tensor:
    # The largest element of what sets its own scale lies on the limit, up to a rounding.
    return steps.abs() <= how.limit * (1 + 2.0**-20)


def rounded_product(
    x: Tensor,
    scale: Tensor,
    how: Rounding,
    weight: tuple[Tensor, Tensor],
    static: Format,
    inverse: Tensor | None = None,
) -> Tensor:
    """``Q(x) W`` for x ``[..., in]``, with the derivative of ``clamp(x) W``.

    Args:
        x: the activation.
        scale: its scale, one, or ``[..., 1]``; a constant to every derivative.
        how: how x is rounded.
        weight: codes ``[out, in]`` and scale.
        static: the product's constants.
        inverse: as :func:`cast`'s.
    """
    if torch.compiler.is_compiling():
        # What is compiled is differentiated through the body: round on the way in.
        return op((cast(x, scale, how, inverse) * scale).to(how.result), weight, static)
    still = x.detach()
    steps = _steps(still, scale, inverse)
    codes = steps.clamp(-how.limit, how.limit).to(how.kind)
    scales = scale.expand(*x.shape[:-1], 1)
    # Only the derivative of this counts: its value is that of the codes.
    inside = torch.where(_inside(steps, how), x, 0.0).to(how.result)
    return op.straight_through(inside, (codes, scales), weight, static)


def _multiply(x: Tensor, static: Format, codes: Tensor, scale: Tensor) -> Tensor:
    compute = x.dtype if static.native else gemm_dtype(x)
    # W whole, in one product: by parts, multiplied while in the cache, few rows of a large W would
    # take half the time, but with other last bits than the vendor's at some shapes (measured).
    weight = _weight(codes, scale, static.dtype).to(compute)
    return (x.to(compute) @ weight.mT).to(static.result)


def _transposed(g: Tensor, static: Format, codes: Tensor, scale: Tensor) -> Tensor:
    compute = gemm_dtype(g)
    weight = _weight(codes, scale, static.dtype).to(compute)
    return (g.to(compute) @ weight).to(static.result)


def _rounded(
    x: Tensor, static: Format, rounded: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor
) -> Tensor:
    if not static.scaled or is_batched(rounded):
        flat = widen(rounded.reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1), x.dtype)
        return _multiply(flat.reshape(x.shape), static, codes, scale)
    return scaled_product(rounded, x_scale, codes, scale, static)


def scaled_product(
    rounded: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, static: Format
) -> Tensor:
    """The device's float8 GEMM: INC's on a Gaudi, else torch's."""
    if not rounded.numel():  # not even a scale comes with no rows
        return rounded.new_empty(*rounded.shape[:-1], codes.shape[0], dtype=static.result)
    rows, x_rows = rounded.reshape(-1, rounded.shape[-1]), x_scale.reshape(-1, 1)
    if static.one:
        x_rows = x_rows[:1]
    if gaudi(codes.device):
        x_rows = x_rows.reshape(()) if static.one else x_rows
        w_scale = scale.float().reshape(() if scale.numel() == 1 else -1)
        y = torch.ops.hpu.fp8_gemm_v2(
            rows, False, codes.mT, False, None, static.result, x_rows, w_scale, None, False
        )
    elif static.one == (scale.numel() == 1):
        y = torch._scaled_mm(rows, codes.mT, x_rows, scale.mT, out_dtype=static.result)
    else:
        y = (rows.float() @ codes.float().mT * x_rows * scale.flatten()).to(static.result)
    product: Tensor = y.reshape(*rounded.shape[:-1], codes.shape[0])
    return product


def gaudi(device: torch.device) -> bool:
    """Whether Habana's float8 GEMM runs on this device."""
    try:
        key = device.type.upper()
        return torch._C._dispatch_has_kernel_for_dispatch_key("hpu::fp8_gemm_v2", key)
    except RuntimeError:  # no such operator
        return False


op = FrozenLinear(_multiply, _transposed, rounded=_rounded, n_aux=2)
