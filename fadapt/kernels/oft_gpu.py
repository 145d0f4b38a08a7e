"""OFT on a GPU, in Triton: R from its vectors and the way back, one program a block; ``x R`` and
``x^T g``, block by block, without a copy of x in another dtype or order.

The plain torch that they must equal is ``skew``, ``cayley`` and ``polynomial`` of ``cayley.py``,
and batched products. In eager mode a step is bound by its launches: these are one each.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fadapt.cayley import size_of
from fadapt.kernels import oft_triton, oft_triton_large
from fadapt.kernels.eager import launch
from fadapt.kernels.oft_fused import fused
from fadapt.kernels.oft_ops import Coefficients, ops, series_of

MOST, MOST_WIDE = 128, 64  # the largest block; and of a float32 x, for want of registers
_FEW = 1024  # rows
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of x
_SMALL = 64  # the largest block whose matrices fit into registers


def build(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """R ``[..., b, b]`` of float32 ``vectors [..., b (b - 1) / 2]``."""
    size, n = _counts(vectors)
    vectors, R = vectors.contiguous(), vectors.new_empty((*vectors.shape[:-1], size, size))
    *numbers, degree = _known(coefficients)
    constants, grid, options = (degree, size, _tile(size)[0]), (n, 1, 1), _options(size)
    if size <= _SMALL:
        launch(oft_triton.build, grid, (vectors, R), (*numbers,), constants, **options)
        return R
    tensors = vectors, R, vectors.new_empty(n, 2, size, size)
    launch(oft_triton_large.build, grid, tensors, (*numbers,), constants, **options)
    return R


def build_backward(
    vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients
) -> Tensor:
    """The gradient with respect to ``vectors``, from that with respect to R; R itself is read for
    the exact form."""
    size, n = _counts(vectors)
    vectors, g = vectors.contiguous(), g.contiguous()
    out = torch.empty_like(vectors)
    *numbers, degree = _known(coefficients)
    sums = max(degree - 1, 0) // 2
    large = size > _SMALL
    matrices = (sums if sums > 1 else 0) + (5 if sums > 1 else 3) * large
    spare = vectors.new_empty(n, matrices, size, size) if matrices else vectors
    launch(
        (oft_triton_large if large else oft_triton).build_backward,
        (n, 1, 1),
        (vectors, g if R is None else R.contiguous(), g, spare, out),
        (*numbers,),
        (degree, size, _tile(size)[0]),
        **_options(size),
    )
    return out


def takes(x: Tensor, blocks: Tensor) -> bool:
    """Whether :func:`rotate` takes them, if Triton does."""
    most = MOST if x.dtype == torch.bfloat16 else MOST_WIDE
    known = x.dtype in _DTYPES and blocks.dtype in (torch.float32, x.dtype)
    return known and blocks.shape[-1] <= most


def _rotated(x: Tensor, R: Tensor) -> Tensor:
    width, size = x.shape[-1], R.shape[-1]
    k = R.shape[0] if R.dim() == 4 else 1
    x = x.contiguous()
    y = torch.empty_like(x)
    t = x.numel() // (k * width)
    if t == 0:
        return y
    tile, rows, warps = _tile(size)
    grid = -(-t // rows), width // size, k
    numbers = t, width, *_strides(R)
    launch(oft_triton.rotate, grid, (x, R, y), numbers, (size, tile, rows), num_warps=warps)
    return y


def _products(x: Tensor, g: Tensor, size: int, k: int) -> Tensor:
    width, each = x.shape[-1], (k,) if k else ()
    x, g = x.contiguous(), g.contiguous()
    out = x.new_empty(*each, width // size, size, size, dtype=torch.float32)
    tile, rows, warps = _tile(size)
    k = max(k, 1)
    numbers = x.numel() // (k * width), width
    grid = width // size, k, 1
    launch(oft_triton.outer, grid, (x, g, out), numbers, (size, tile, rows), num_warps=warps)
    return out


def _both(x: Tensor, R: Tensor, g: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor] | None:
    """Both gradients of ``x R`` by one kernel, ``g R^T`` in x's dtype and ``x^T g`` in R's, where R
    is not shared and rows are so few that a step is bound by its launches."""
    width, size = x.shape[-1], R.shape[-1]
    if R.shape[-3] == 1 or not 0 < x.numel() // width <= _FEW:
        return None
    k = R.shape[0] if R.dim() == 4 else 1
    x, g = x.contiguous(), g.contiguous()
    dx = torch.empty_like(x) if needs_x else None
    dR = R.new_empty(R.shape, dtype=torch.float32)
    tile, rows, warps = _tile(size)
    numbers = x.numel() // (k * width), width, *_strides(R)
    launch(
        oft_triton.rotate_back, (width // size, k, 1), (x, g, R, g if dx is None else dx, dR),
        numbers, (int(needs_x), size, tile, rows), num_warps=warps,
    )  # fmt: skip
    return dx, dR if R.dtype == torch.float32 else dR.to(R.dtype)


def fuses(vectors: Tensor, coefficients: Coefficients) -> bool:
    """Whether :func:`turned` gains anything by these vectors ``[..., m]``: a series of small blocks
    takes less time to sum than R takes to write and read."""
    known = coefficients is not None and series_of(coefficients) is not None
    return known and vectors.dtype == torch.float32 and 2 <= size_of(vectors.shape[-1]) <= _SMALL


def turns(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> bool:
    """Whether :func:`turned` gains anything: of many rows, each sums the series for too few."""
    if x.dtype not in _DTYPES or not fuses(vectors, coefficients):
        return False
    width, many = size_of(vectors.shape[-1]) * vectors.shape[-2], vectors.shape[:-2].numel()
    return x.shape[-1] == width and 0 < x.numel() // (many * width) <= _FEW


def _turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> tuple[Tensor, None]:
    (t, r, k), numbers, (degree, size, tile, rows), warps = _turning(x, vectors, coefficients)
    x = x.contiguous()
    y = torch.empty_like(x)
    if tile <= 32:  # which sums a block's series half as often
        rows, warps = 2 * rows, warps // 2
    grid, tensors = (-(-t // rows), r, k), (x, vectors.contiguous(), y)
    constants = degree, size, tile, rows
    launch(oft_triton.turn, grid, tensors, numbers, constants, num_warps=warps)
    return y, None


def _turned_back(
    x: Tensor, vectors: Tensor, R: None, g: Tensor, coefficients: Coefficients, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    (_, r, k), numbers, constants, warps = _turning(x, vectors, coefficients)
    x, g, vectors = x.contiguous(), g.contiguous(), vectors.contiguous()
    dx = torch.empty_like(x) if needs_x else None
    dv = torch.empty_like(vectors)
    degree, size, *_ = constants
    sums = (degree - 1) // 2
    spare = vectors.new_empty(k * r, sums, size, size) if sums > 1 else vectors
    launch(
        oft_triton.turn_back, (r, k, 1), (x, g, vectors, spare, g if dx is None else dx, dv),
        numbers, (int(needs_x), *constants), num_warps=warps,
    )  # fmt: skip
    return dx, dv


def _turning(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Any:
    """``(t, r, k)``, rows and blocks of each; and a launch's numbers, constants and warps."""
    *factors, degree = _known(coefficients)
    width, r = x.shape[-1], vectors.shape[-2]
    k = vectors.shape[0] if vectors.dim() == 3 else 1
    t, size = x.numel() // (k * width), width // r
    *tiles, warps = _tile(size)
    return (t, r, k), (t, width, *factors), (degree, size, *tiles), warps


# ``x R`` in x's dtype, and ``x^T g`` in float32; and ``x R`` by R's vectors.
rotate, _outer = ops(_rotated, _products, _both)
turned = fused(_turned, _turned_back, turns, rotate, _outer)


def _strides(R: Tensor) -> tuple[int, int, int, int]:
    """Of R's four axes, 0 where it has one thing for all."""
    each, by_r, by_i, by_j = R.stride() if R.dim() == 4 else (0, *R.stride())
    each = each if R.dim() == 4 and R.shape[0] > 1 else 0
    return each, by_r if R.shape[-3] > 1 else 0, by_i, by_j


def _known(coefficients: Coefficients) -> tuple[float, float, int]:
    form = series_of(coefficients)
    assert form is not None
    return form


def _counts(vectors: Tensor) -> tuple[int, int]:
    """The blocks' size, and their number."""
    return size_of(vectors.shape[-1]), vectors.shape[:-1].numel()


@cache
def _tile(size: int) -> tuple[int, int, int]:
    """Of a block: its width, a power of 2 of at least 16; for x, how many rows at a time, and by
    how many warps."""
    width = max(16, 1 << (size - 1).bit_length())
    return (width, 64, 4) if width <= 64 else (width, 32, 8)


@cache
def _options(size: int) -> dict[str, int]:
    return {"num_warps": {16: 1, 32: 2, 64: 4}.get(_tile(size)[0], 8), "num_stages": 1}
