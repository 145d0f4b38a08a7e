"""OFT on a GPU, in Triton: R from its vectors and the way back, one program a block; ``x R`` and
``x^T g``, block by block, without a copy of x in another dtype or order.

The plain torch that they must equal is ``skew``, ``cayley`` and ``polynomial`` of ``cayley.py``,
and batched products. In eager mode a step is bound by its launches: these are one each.
"""

from functools import cache

import torch
from torch import Tensor

from fadapt.kernels import oft_triton, oft_triton_large
from fadapt.kernels.eager import launch
from fadapt.kernels.oft_ops import Coefficients, ops, series_of

MOST, MOST_WIDE = 128, 64  # the largest block; and of a float32 x, for want of registers
_FEW = 1024  # rows
_SMALL = 64  # the largest block whose matrices fit into registers


def build(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """R ``[..., b, b]`` of float32 ``vectors [..., b (b - 1) / 2]``."""
    size, flat = _flat(vectors)
    R = vectors.new_empty(*vectors.shape[:-1], size, size)
    *numbers, degree = _known(coefficients)
    constants, grid, options = (degree, size, _tile(size)[0]), (len(flat), 1, 1), _options(size)
    if size <= _SMALL:
        launch(oft_triton.build, grid, (flat, R), (*numbers,), constants, **options)
        return R
    tensors = flat, R, flat.new_empty(len(flat), 2, size, size)
    launch(oft_triton_large.build, grid, tensors, (*numbers,), constants, **options)
    return R


def build_backward(
    vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients
) -> Tensor:
    """The gradient with respect to ``vectors``, from that with respect to R; R itself is read for
    the exact form."""
    size, flat = _flat(vectors)
    out = torch.empty_like(flat)
    g = g.contiguous()
    *numbers, degree = _known(coefficients)
    sums = max(degree - 1, 0) // 2
    large = size > _SMALL
    matrices = (sums if sums > 1 else 0) + (5 if sums > 1 else 3) * large
    spare = flat.new_empty(len(flat), matrices, size, size) if matrices else flat
    launch(
        (oft_triton_large if large else oft_triton).build_backward,
        (len(flat), 1, 1),
        (flat, g if R is None else R.contiguous(), g, spare, out),
        (*numbers,),
        (degree, size, _tile(size)[0]),
        **_options(size),
    )
    return out.view(vectors.shape)


def takes(x: Tensor, blocks: Tensor) -> bool:
    """Whether :func:`rotate` takes them, if Triton does."""
    most = MOST if x.dtype == torch.bfloat16 else MOST_WIDE
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and blocks.dtype in (torch.float32, x.dtype) and blocks.shape[-1] <= most


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


def _both(x: Tensor, R: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both gradients of ``x R`` by one kernel, ``g R^T`` in x's dtype and ``x^T g`` in R's, where R
    is not shared and rows are so few that a step is bound by its launches."""
    width, size = x.shape[-1], R.shape[-1]
    if R.shape[-3] == 1 or not 0 < x.numel() // width <= _FEW:
        return None
    k = R.shape[0] if R.dim() == 4 else 1
    x, g = x.contiguous(), g.contiguous()
    dx = torch.empty_like(x)
    dR = torch.empty_like(R, dtype=torch.float32, memory_format=torch.contiguous_format)
    tile, rows, warps = _tile(size)
    numbers = x.numel() // (k * width), width, *_strides(R)
    launch(
        oft_triton.rotate_back, (width // size, k, 1), (x, g, R, dx, dR), numbers,
        (size, tile, rows), num_warps=warps,
    )  # fmt: skip
    return dx, dR if R.dtype == torch.float32 else dR.to(R.dtype)


# ``x R`` in x's dtype, and ``x^T g`` in float32.
rotate, _outer = ops(_rotated, _products, _both)


def _strides(R: Tensor) -> tuple[int, int, int, int]:
    """Of R's four axes, 0 where it has one thing for all."""
    each, by_r, by_i, by_j = R.stride() if R.dim() == 4 else (0, *R.stride())
    each = each if R.dim() == 4 and R.shape[0] > 1 else 0
    return each, by_r if R.shape[-3] > 1 else 0, by_i, by_j


def _known(coefficients: Coefficients) -> tuple[float, float, int]:
    form = series_of(coefficients)
    assert form is not None
    return form


def _flat(vectors: Tensor) -> tuple[int, Tensor]:
    from fadapt.cayley import size_of

    return size_of(vectors.shape[-1]), vectors.reshape(-1, vectors.shape[-1]).contiguous()


@cache
def _tile(size: int) -> tuple[int, int, int]:
    """Of a block: its width, a power of 2 of at least 16; for x, how many rows at a time, and by
    how many warps."""
    width = max(16, 1 << (size - 1).bit_length())
    return (width, 64, 4) if width <= 64 else (width, 32, 8)


@cache
def _options(size: int) -> dict[str, int]:
    return {"num_warps": {16: 1, 32: 2, 64: 4}.get(_tile(size)[0], 8), "num_stages": 1}
