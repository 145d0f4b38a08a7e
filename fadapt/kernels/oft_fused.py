"""``x R`` straight from R's vectors, as one op of autograd: of a small step each op that there is
costs more than what it computes, and R's own gradient is of no use to a step that rotates once.

What looks on, or differentiates twice, sees the two ops that this one is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fadapt._function import direct, mapped
from fadapt.cayley import back_by_kernels, rotation
from fadapt.kernels.eager import readable
from fadapt.kernels.oft_ops import Coefficients, by_adapter, of_blocks, unrecorded

_functorch = torch._C._functorch


def fused(
    body: Callable[..., tuple[Tensor, Tensor | None]],
    back: Callable[..., tuple[Tensor | None, Tensor]],
    takes: Callable[[Tensor, Tensor, Coefficients], bool],
    rotate: Callable[[Tensor, Tensor], Tensor],
    outer: Callable[..., Tensor],
) -> Callable[[Tensor, Tensor, Coefficients], Tensor]:
    """``turned(x, vectors, coefficients)``, in x's dtype, for vectors ``[r, m]``, or ``[k, r, m]``
    of which each takes a kth of x's rows; for where nothing but ``vmap`` looks on.

    Args:
        body: of the same, ``x R``; and R, if the way back is to have it.
        back: of x, the vectors, R or None, the result's gradient, the coefficients, and whether x
            needs one: the gradients of x, or None, and of the vectors.
        takes: whether ``body`` takes these.
        rotate, outer: of :func:`fadapt.kernels.oft_ops.ops`.
    """

    class Turn(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor:
            y, R = body(x, vectors, coefficients)
            ctx.coefficients = coefficients
            ctx.save_for_backward(x, vectors, R)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            x, vectors, R = ctx.saved_tensors
            coefficients = ctx.coefficients
            needs_x, needs_vectors, _ = ctx.needs_input_grad
            plain = unrecorded(x, vectors, g)
            if plain and needs_vectors:
                return *back(x, vectors, R, g, coefficients, needs_x), None
            R = R if plain and R is not None else rotation(vectors, coefficients)
            dx = rotate(g, R.mT) if needs_x else None
            dv = None
            if needs_vectors:
                dR = of_blocks(outer, x, g, R)
                dv = back_by_kernels(vectors, R, dR, coefficients)
            return dx, dv, None

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor, vectors: Tensor, coefficients: Any) -> Any:
            def run(x: Tensor, vectors: Tensor) -> Tensor:
                if takes(x, vectors, coefficients):
                    return turned(x, vectors, coefficients)
                # Where x alone is mapped over, as by samples, that is more rows for each block.
                return rotate(x, rotation(vectors, coefficients))

            return by_adapter(info, in_dims, x, vectors, 3, run)

    apply = direct(Turn)

    def turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor:
        y: Tensor
        if _functorch.peek_interpreter_stack() is not None:
            y = mapped(Turn, turned, (x, vectors, coefficients))
        elif not readable(x, vectors):
            y = rotate(x, rotation(vectors, coefficients))
        elif torch.is_grad_enabled():
            y = apply(x, vectors, coefficients)
        else:
            y, _ = body(x, vectors, coefficients)
        return y

    return turned


def watched() -> bool:
    """Whether a transform looks on that is no ``vmap``."""
    if forward_ad._current_level >= 0:
        return True
    if _functorch.peek_interpreter_stack() is None:
        return False
    vmap = _functorch.TransformType.Vmap
    return any(level.key() != vmap for level in _functorch.get_interpreter_stack() or ())
