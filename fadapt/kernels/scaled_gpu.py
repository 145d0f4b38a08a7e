"""Int8 and float8 codes as a float weight on a GPU, in one pass, by Triton.

Plain torch makes a pass for each of the cast, the zero point, the scale and the rounding, in
float32 where the scale is; and its cast alone, of 4096 x 4096 codes to bfloat16 on an H100, takes
48 us (int8) or 54 (float8), where all of it takes 20 here. The plain torch that this must equal,
bit for bit, is ``dequantize`` in ``bases/fp8.py`` and ``bases/int8_product.py``.
"""

from functools import cache

import torch
from torch import Tensor

from fadapt.kernels.gpu import DTYPES, launch, runs

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS, COLUMNS = 4, 1024  # of a program's tile
# The CPU launches a Triton kernel in about the time of two torch operations. That gains where it
# does the work of several, and in place of a cast alone for more codes than these: of 4096 x 4096,
# in eager mode, the product of int8 weights is a fifth slower by it.
LEAST_CAST = 2**25


def usable(codes: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel takes ``codes [out, in]``, with a scale a row or a group of a row."""
    return (
        runs(codes)
        and dtype in DTYPES
        and codes.numel() > 0
        and codes.is_contiguous()
        and (codes.dtype in (torch.int8, torch.float8_e5m2) or _has_e4m3(codes))
        and (codes.numel() >= LEAST_CAST if scale is None else _fits(codes, scale))
        and (zero is None or zero.is_contiguous())
    )


def dequantize(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(codes - zero) * scale``, computed in float32 and rounded once.

    Args:
        codes: int8 or float8 ``[out, in]``.
        scale: ``[out, groups]``, floating; None for ones, and then ``zero`` is None too.
        zero: like ``scale``, or None for zeros.
        dtype: of the result ``[out, in]``: float32, float16 or bfloat16.
    """
    n_out, n_in = codes.shape
    groups = 1 if scale is None else scale.shape[1]
    weight = torch.empty_like(codes, dtype=dtype)
    launch(
        _dequantize,
        (-(-n_in // COLUMNS), -(-n_out // ROWS)),
        *(codes, scale, zero, weight),
        *(n_out, n_in, groups),
        *(groups > 1, ROWS, COLUMNS, COLUMNS if groups == 1 else n_in // groups),
    )
    return weight


def _fits(codes: Tensor, scale: Tensor) -> bool:
    n_out, n_in = codes.shape
    groups = scale.shape[-1]
    size = n_in // groups
    whole = groups == 1 or (size * groups == n_in and size & (size - 1) == 0 and size <= COLUMNS)
    return whole and scale.shape == (n_out, groups) and scale.is_contiguous()


def _has_e4m3(codes: Tensor) -> bool:
    return codes.dtype == torch.float8_e4m3fn and _capability(codes.get_device()) >= (8, 9)


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


if triton is not None:

    @triton.jit
    def _dequantize(
        codes,
        scale,
        zero,
        weight,
        n_out,
        n_in,
        groups,
        GROUPED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        group = tl.program_id(0) * (COLUMNS // SIZE) + tl.arange(0, COLUMNS // SIZE)[None, :]
        inside = (row < n_out) & (group * SIZE < n_in)
        place = row.to(tl.int64) * groups + (group if GROUPED else group * 0)
        column = group[:, :, None] * SIZE + tl.arange(0, SIZE)
        real = inside[:, :, None] & (column < n_in)
        at = row[:, :, None].to(tl.int64) * n_in + column
        value = tl.load(codes + at, mask=real).to(tl.float32)
        if zero is not None:
            value -= tl.load(zero + place, mask=inside).to(tl.float32)[:, :, None]
        if scale is not None:
            value *= tl.load(scale + place, mask=inside).to(tl.float32)[:, :, None]
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=real)
