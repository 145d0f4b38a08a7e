"""OFT's rotation by whatever a device has for it: ``x R``, and ``x R`` straight from R's vectors.

A step that rotates once has no use for R's own gradient, which for K adapters is larger than all
else that it holds: there, build and rotation are one op of autograd. What looks on, or
differentiates twice, sees the two ops that this one is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fadapt._function import direct, mapped
from fadapt.cayley import back_by_kernels, rotation
from fadapt.kernels import oft_cpu_rows
from fadapt.kernels.eager import forward_twice, oft_kernels, readable, usable
from fadapt.kernels.oft_ops import Coefficients, by_adapter, of_blocks, turn, unrecorded

_functorch = torch._C._functorch


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """``x R`` in x's dtype, for x ``[..., in]`` and blocks ``[r, b, b]``, r being ``in / b`` or 1;
    or blocks ``[k, r, b, b]``, of which each takes a kth of x's rows."""
    # Of one adapter on a CPU, plain torch is as fast.
    many = blocks.dim() == 4 or torch._C._are_functorch_transforms_active()
    if forward_twice():
        return turn(x, blocks)
    if x.device.type == "cpu":
        y: Tensor = oft_cpu_rows.rotate(x, blocks) if many and _eager() else turn(x, blocks)
        return y
    if usable(x, blocks):
        gpu = oft_kernels()
        if gpu.takes(x, blocks):
            return gpu.rotate(x, blocks)  # type: ignore[no-any-return]
    return turn(x, blocks)


def turn_by(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor | None:
    """``x R`` in x's dtype, of R's vectors ``[r, m]``; None where R is better built by itself."""
    if x.device.type != "cpu" or forward_twice() or not _eager():
        return None
    if not oft_cpu_rows.takes(x, vectors, coefficients):
        return None
    return turned(x, vectors, coefficients)


def _eager() -> bool:
    """On a CPU. Autocast knows plain torch alone."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return not traced and not torch.is_autocast_enabled("cpu")


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor:
        y: Tensor
        y, R = oft_cpu_rows.turned(x, vectors, coefficients)
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
            return *oft_cpu_rows.turned_back(x, vectors, R, g, coefficients, needs_x), None
        R = R if plain and R is not None else rotation(vectors, coefficients)
        dx = oft_cpu_rows.rotate(g, R.mT) if needs_x else None
        dv = None
        if needs_vectors:
            dR = of_blocks(oft_cpu_rows.outer, x, g, R)
            dv = back_by_kernels(vectors, R, dR, coefficients)
        return dx, dv, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, vectors: Tensor, coefficients: Any) -> Any:
        def run(x: Tensor, vectors: Tensor) -> Tensor:
            if oft_cpu_rows.takes(x, vectors, coefficients):
                return turned(x, vectors, coefficients)
            # Where x alone is mapped over, as by samples, that is more rows for each block.
            return oft_cpu_rows.rotate(x, rotation(vectors, coefficients))

        return by_adapter(info, in_dims, x, vectors, 3, run)


def turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """``x R`` in x's dtype, of R's vectors ``[r, m]``, or ``[k, r, m]`` of which each takes a kth
    of x's rows."""
    level = _functorch.peek_interpreter_stack()
    y: Tensor
    if level is not None and level.key() == _functorch.TransformType.Vmap:
        y = mapped(_Turn, turned, (x, vectors, coefficients))
    elif level is not None or forward_ad._current_level >= 0 or not readable(x, vectors):
        y = oft_cpu_rows.rotate(x, rotation(vectors, coefficients))
    elif torch.is_grad_enabled():
        y = _apply(x, vectors, coefficients)
    else:
        y, _ = oft_cpu_rows.turned(x, vectors, coefficients)
    return y


_apply = direct(_Turn)
