"""``x R`` block by block, and ``x^T g``: two differentiable ops made of a device's two bodies.

Each is the other's derivative, so both have derivatives of any order, under every transform.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fadapt._function import applied
from fadapt.bases.precision import gemm_dtype
from fadapt.kernels.eager import readable

Coefficients = tuple[float, ...] | None


def ops(
    rotated: Callable[[Tensor, Tensor], Tensor | None],
    products: Callable[[Tensor, Tensor, int, int], Tensor | None],
    both: Callable[..., tuple[Tensor | None, Tensor] | None] | None = None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``rotate(x, R)`` and ``outer(x, g, size, k)``; the bodies take plain tensors, and
    return None where plain torch shall do.

    Args:
        rotated: ``x R`` in x's dtype, for x ``[..., in]`` and R ``[r, b, b]``, r being ``in / b``
            or 1; or R ``[k, r, b, b]``, of which each takes a kth of x's rows.
        products: ``x^T g`` of x, g ``[..., in]``, block by block: ``[in / b, b, b]``, b the
            ``size``, in float32 at least; with k > 0, ``[k, in / b, b, b]``, each of a kth of the
            rows.
        both: of x, R, g, and whether x needs one, the two gradients, where that is faster; or None.
    """

    class Rotate(Function):
        @staticmethod
        def forward(x: Tensor, R: Tensor) -> Tensor:
            y = rotated(x, R) if readable(x, R) else None
            return turn(x, R) if y is None else y

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            x, R = ctx.saved_tensors
            needs_x, needs_R = ctx.needs_input_grad
            if both is not None and needs_R and unrecorded(x, R, g):
                found = both(x, R, g, needs_x)
                if found is not None:
                    return found
            dx = rotate(g, R.mT) if needs_x else None
            dR = of_blocks(outer, x, g, R) if needs_R else None
            return dx, dR

        @staticmethod
        def jvp(ctx: Any, tx: Tensor | None, tR: Tensor | None) -> Tensor:  # type: ignore[override]
            x, R = ctx.saved_tensors
            parts = [rotate(a, b) for a, b in ((tx, R), (x, tR)) if a is not None and b is not None]
            return sum(parts[1:], parts[0])

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor, R: Tensor) -> Any:
            return by_adapter(info, in_dims, x, R, 4, rotate)

    class Outer(Function):
        @staticmethod
        def forward(x: Tensor, g: Tensor, size: int, k: int) -> Tensor:
            found = products(x, g, size, k) if readable(x, g) else None
            if found is not None:
                return found
            kind = torch.promote_types(x.dtype, torch.float32)
            a, b = (apart(t.to(kind), size, (k,) if k else ()) for t in (x, g))
            return a.mT @ b

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
            parts = [
                outer(a, b, ctx.size, ctx.k) for a, b in pairs if a is not None and b is not None
            ]
            return sum(parts[1:], parts[0])

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor, g: Tensor, size: int, k: int) -> Any:
            x, g = stacked(info, in_dims, x, g)
            if k == 0:
                return outer(x, g, size, info.batch_size), 0
            out = outer(x.flatten(0, 1), g.flatten(0, 1), size, info.batch_size * k)
            return out.unflatten(0, (info.batch_size, k)), 0

    rotate: Callable[..., Tensor] = applied(Rotate)
    outer: Callable[..., Tensor] = applied(Outer)
    return rotate, outer


def of_blocks(outer: Callable[..., Tensor], x: Tensor, g: Tensor, R: Tensor) -> Tensor:
    """The gradient of ``x R`` with respect to R, from that with respect to it."""
    found = outer(x, g, R.shape[-1], R.shape[0] if R.dim() == 4 else 0).to(R.dtype)
    return found if R.shape[-3] > 1 else found.sum(-3, keepdim=True)


@cache
def series_of(coefficients: Coefficients) -> tuple[float, float, int] | None:
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


def turn(x: Tensor, R: Tensor) -> Tensor:
    """``x R`` in x's dtype, in plain torch: what ``rotated`` must equal."""
    kind = gemm_dtype(R)
    size, (wide, R) = R.shape[-1], (t.to(kind) for t in (x, R))
    if R.shape[:-2] == (1,):
        turned: Tensor = wide.reshape(*wide.shape[:-1], wide.shape[-1] // size, size) @ R[0]
        return turned.reshape(x.shape).to(x.dtype)
    rows = apart(wide, size, R.shape[:-3])
    turned = torch.bmm(rows, R) if R.dim() == 3 else rows @ R  # which takes five nodes of autograd
    return turned.transpose(-2, -3).reshape(x.shape).to(x.dtype)


def apart(x: Tensor, size: int, lead: Sequence[int]) -> Tensor:
    """``[..., in]`` as ``[r, t, b]``; or as ``[k, r, t, b]``, the ``lead`` being ``[k]``."""
    return x.reshape(*lead, -1, x.shape[-1] // size, size).transpose(-2, -3)


def fits(x: Tensor, r: int, size: int) -> bool:
    """Whether x's rows are r blocks, or any number of one that all share: of others torch would
    raise, where a kernel reads and leaves what it finds."""
    width = x.shape[-1]
    return width == r * size or (r == 1 and width % size == 0)


def unrecorded(*tensors: Tensor) -> bool:
    """Whether nothing differentiates or maps over what is done with these."""
    return (
        not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and readable(*tensors)
    )


def by_adapter(
    info: Any, in_dims: Any, x: Tensor, turn: Tensor, many: int, call: Callable[..., Tensor]
) -> tuple[Tensor, int]:
    """A vmap's rule of what takes rows and rotations, the latter of ``many`` axes where each has a
    kth of the rows."""
    each = turn.dim() - (in_dims[1] is not None) == many
    if in_dims[1] is None:  # one for all: more rows
        place = 1 if each else 0
        return call(x.movedim(in_dims[0], place), turn), place
    x, turn = stacked(info, in_dims, x, turn)
    if not each:
        return call(x, turn), 0
    return call(x.flatten(0, 1), turn.flatten(0, 1)).unflatten(0, x.shape[:2]), 0


def stacked(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """With the mapped axis first."""
    return [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]
