"""OFT on a GPU, in Triton: R from its vectors and the way back, one program a block; ``x R`` and
``x^T g``, block by block, without a copy of x in another dtype or order.

The plain torch that they must equal is ``skew``, ``cayley`` and ``polynomial`` of ``cayley.py``,
and batched products. In eager mode a step is bound by its launches: these are one each.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fadapt._function import applied
from fadapt.kernels import oft_triton
from fadapt.kernels.eager import launch, readable

MOST, MOST_WIDE = 128, 64  # the largest block; and of a float32 x, for want of registers
_FEW = 1024  # rows
_STEP = 32  # how much of a block a product takes at a time
Coefficients = tuple[float, ...] | None


@cache
def form_of(coefficients: Coefficients) -> tuple[float, float, int] | None:
    """``(sign, last, degree)`` of ``I + 2 sum_(k < degree) (sign Q)^k + last (sign Q)^degree``,
    as all series of Cayley's transform are; degree 0 is the exact form; None for another."""
    if coefficients is None:
        return 1.0, 0.0, 0
    degree = len(coefficients) - 1
    if degree < 1 or coefficients[0] != 1:
        return None
    sign = -1.0 if coefficients[1] < 0 else 1.0
    last = coefficients[-1] * sign**degree
    whole = (1.0, *(2 * sign**k for k in range(1, degree)), last * sign**degree)
    return (sign, last, degree) if coefficients == whole else None


def build(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """R ``[..., b, b]`` of float32 ``vectors [..., b (b - 1) / 2]``."""
    size, flat = _flat(vectors)
    R = vectors.new_empty(*vectors.shape[:-1], size, size)
    sign, last, degree = _known(coefficients)
    spare = _spare(flat, size, 2)
    constants = degree, size, _tile(size)[0], _STEP
    grid = flat.shape[0], 1, 1
    launch(oft_triton.build, grid, (flat, R, spare), (sign, last), constants, **_options(size))
    return R


def build_backward(
    vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients
) -> Tensor:
    """The gradient with respect to ``vectors``, from that with respect to R; R itself is read for
    the exact form."""
    size, flat = _flat(vectors)
    out = torch.empty_like(flat)
    g = g.contiguous()
    sign, last, degree = _known(coefficients)
    sums = max(degree - 1, 0) // 2
    spare = _spare(flat, size, 3 + sums, always=sums > 1)
    tensors = flat, g if R is None else R, g, spare, out
    constants = degree, size, _tile(size)[0], _STEP
    grid = flat.shape[0], 1, 1
    launch(oft_triton.build_backward, grid, tensors, (sign, last), constants, **_options(size))
    return out.view(vectors.shape)


def takes(x: Tensor, blocks: Tensor) -> bool:
    """Whether :func:`rotate` takes them, if Triton does."""
    most = MOST if x.dtype == torch.bfloat16 else MOST_WIDE
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and blocks.dtype in (torch.float32, x.dtype) and blocks.shape[-1] <= most


class _Rotate(Function):
    """``x R`` for x ``[..., in]`` and R ``[r, b, b]``, r being ``in / b`` or 1; or R
    ``[k, r, b, b]``, of which each takes a kth of x's rows."""

    @staticmethod
    def forward(x: Tensor, R: Tensor) -> Tensor:
        width, size = x.shape[-1], R.shape[-1]
        k = R.shape[0] if R.dim() == 4 else 1
        if not readable(x, R):
            turned: Tensor = _apart(x, size, k).to(R.dtype) @ R
            return turned.transpose(-2, -3).reshape(x.shape).to(x.dtype)
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, R = ctx.saved_tensors
        if all(ctx.needs_input_grad) and _together(x, R, g):
            return _both(x, R, g)
        dx = rotate(g, R.mT) if ctx.needs_input_grad[0] else None
        dR = None
        if ctx.needs_input_grad[1]:
            dR = _outer(x, g, R.shape[-1], R.shape[0] if R.dim() == 4 else 0).to(R.dtype)
            dR = dR if R.shape[-3] > 1 else dR.sum(-3, keepdim=True)
        return dx, dR

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tR: Tensor | None) -> Tensor:  # type: ignore[override]
        x, R = ctx.saved_tensors
        parts = [rotate(a, b) for a, b in ((tx, R), (x, tR)) if a is not None and b is not None]
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, R: Tensor) -> Any:
        each = R.dim() - (in_dims[1] is not None) == 4
        if in_dims[1] is None:  # one R for all: more rows
            place = 1 if each else 0
            return rotate(x.movedim(in_dims[0], place), R), place
        x, R = _stacked(info, in_dims, x, R)
        if not each:
            return rotate(x, R), 0
        return rotate(x.flatten(0, 1), R.flatten(0, 1)).unflatten(0, x.shape[:2]), 0


class _Outer(Function):
    """``x^T g`` of x, g ``[..., in]``, block by block: float32 ``[in / b, b, b]``; with k > 0,
    ``[k, in / b, b, b]``, each of a kth of the rows."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, size: int, k: int) -> Tensor:
        width, each = x.shape[-1], (k,) if k else ()
        if not readable(x, g):
            a, b = (_apart(t, size, max(k, 1)).float() for t in (x, g))
            product: Tensor = a.transpose(-1, -2) @ b
            return product.reshape(*each, *product.shape[-3:])
        x, g = x.contiguous(), g.contiguous()
        out = x.new_empty(*each, width // size, size, size, dtype=torch.float32)
        tile, rows, warps = _tile(size)
        k = max(k, 1)
        numbers = x.numel() // (k * width), width
        grid = width // size, k, 1
        launch(oft_triton.outer, grid, (x, g, out), numbers, (size, tile, rows), num_warps=warps)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, g, ctx.size, ctx.k = inputs
        ctx.save_for_backward(x, g)
        ctx.save_for_forward(x, g)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:  # type: ignore[override]
        x, g = ctx.saved_tensors
        dx = rotate(g, G.mT) if ctx.needs_input_grad[0] else None
        dg = rotate(x, G) if ctx.needs_input_grad[1] else None
        return dx, dg, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tg: Tensor | None, *_: Any) -> Tensor:  # type: ignore[override]
        x, g = ctx.saved_tensors
        pairs = ((tx, g), (x, tg))
        parts = [_outer(a, b, ctx.size, ctx.k) for a, b in pairs if a is not None and b is not None]
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, g: Tensor, size: int, k: int) -> Any:
        x, g = _stacked(info, in_dims, x, g)
        if k == 0:
            return _outer(x, g, size, info.batch_size), 0
        out = _outer(x.flatten(0, 1), g.flatten(0, 1), size, info.batch_size * k)
        return out.unflatten(0, (info.batch_size, k)), 0


def _together(x: Tensor, R: Tensor, g: Tensor) -> bool:
    """Whether one kernel takes both gradients of a rotation: nothing is recorded, R is not shared,
    and there are so few rows that a step is bound by its launches."""
    return (
        not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and R.shape[-3] > 1
        and 0 < x.numel() // x.shape[-1] <= _FEW
        and readable(x, R, g)
    )


def _both(x: Tensor, R: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x R``: ``g R^T`` in x's dtype, ``x^T g`` in R's."""
    width, size = x.shape[-1], R.shape[-1]
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


# ``x R`` in x's dtype: see _Rotate.
rotate: Callable[..., Tensor] = applied(_Rotate)
_outer: Callable[..., Tensor] = applied(_Outer)


def _apart(x: Tensor, size: int, k: int) -> Tensor:
    """``[..., in]`` as ``[k, r, t, b]``; ``[r, t, b]`` of one."""
    apart = x.reshape(k, -1, x.shape[-1] // size, size).transpose(1, 2)
    return apart if k > 1 else apart.reshape(apart.shape[1:])


def _stacked(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """With the mapped axis first."""
    return [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


def _strides(R: Tensor) -> tuple[int, int, int, int]:
    """Of R's four axes, 0 where it has one thing for all."""
    each, by_r, by_i, by_j = R.stride() if R.dim() == 4 else (0, *R.stride())
    each = each if R.dim() == 4 and R.shape[0] > 1 else 0
    return each, by_r if R.shape[-3] > 1 else 0, by_i, by_j


def _known(coefficients: Coefficients) -> tuple[float, float, int]:
    form = form_of(coefficients)
    assert form is not None
    return form


def _flat(vectors: Tensor) -> tuple[int, Tensor]:
    from fadapt.cayley import size_of

    return size_of(vectors.shape[-1]), vectors.reshape(-1, vectors.shape[-1]).contiguous()


def _spare(flat: Tensor, size: int, matrices: int, always: bool = False) -> Tensor:
    """Room for so many matrices a block, where it is large."""
    large = size > 64 or always
    return flat.new_empty(flat.shape[0], matrices, size, size) if large else flat


@cache
def _tile(size: int) -> tuple[int, int, int]:
    """Of a block: its width, a power of 2 of at least 16; for x, how many rows at a time, and by
    how many warps."""
    width = max(16, 1 << (size - 1).bit_length())
    return (width, 64, 4) if width <= 64 else (width, 32, 8)


@cache
def _options(size: int) -> dict[str, int]:
    return {"num_warps": {16: 1, 32: 2, 64: 4}.get(_tile(size)[0], 8), "num_stages": 1}
