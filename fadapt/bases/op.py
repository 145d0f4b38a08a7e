"""The one differentiable op of every quantized base: ``y = W x`` for a frozen W.

A format supplies plain functions (multiply, multiply by the transpose) and gets an op that passes
eager autograd, every transform of ``torch.func``, ``torch.compile`` and ``torch.export``, and that
saves for backward the *quantized* tensors alone: never a float copy of W, never x.

Three ways in, because no single one passes everything (torch 2.13):

- eager mode takes an ``autograd.Function`` with ``setup_context``, ``vmap`` and ``jvp``, whose
  backward is the transposed op, itself such a Function: derivatives of any order;
- a plain backward under ``torch.compile`` takes a Function without ``jvp``, which Dynamo refuses;
- ``torch.func`` inside ``torch.compile`` takes the body itself. Dynamo cannot ``vmap`` over a
  Function whose input needs a gradient, and where it could, it would differentiate *through* the
  body and never call its backward. So the bodies must be plain torch, whose own derivative is
  right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fadapt._function import applied
from fadapt.bases.precision import without_autocast
from fadapt.errors import FrozenBaseError

# (x [..., in], static, *tensors) -> [..., out]; `static` is the format's constants, any object.
Multiply = Callable[..., Tensor]
Slot = Tensor | None


class FrozenLinear:
    """An op ``op(x, tensors, static)`` made of a format's plain functions.

    Args:
        multiply: ``(x [..., in], static, *tensors) -> [..., out]``; linear in x.
        transposed: ``(g [..., out], static, *tensors) -> [..., in]``; its adjoint.
        rounded: for formats that round the activation too. ``(x, static, *aux, *tensors)``, with
            ``n_aux`` tensors made from x, of the same leading axes, before those of the format.
            :meth:`straight_through` takes its value; derivatives are those of ``multiply``.
    """

    def __init__(
        self,
        multiply: Multiply,
        transposed: Multiply,
        rounded: Multiply | None = None,
        n_aux: int = 0,
    ):
        self._multiply = multiply
        self._compiled = _compiled(multiply, transposed)
        self._eager, adjoint = _eager_pair(multiply, transposed)
        if rounded is not None:
            self._rounded = _eager(rounded, lambda: adjoint, lambda: self._eager, n_aux)

    def __call__(self, x: Tensor, tensors: Sequence[Tensor], static: Any) -> Tensor:
        # A body that upcasts must not be cast down again; x is in autocast's dtype already.
        with without_autocast(x):
            if torch.compiler.is_compiling():
                if torch._C._are_functorch_transforms_active():
                    return self._multiply(x, static, *tensors)
                slots = (*tensors, *[None] * (4 - len(tensors)))
                return self._compiled.apply(x, static, *slots)  # type: ignore[no-any-return]
            return self._eager(x, static, *tensors)

    def straight_through(
        self, x: Tensor, aux: Sequence[Tensor], tensors: Sequence[Tensor], static: Any
    ) -> Tensor:
        """The rounded product, with the derivatives of the exact one. Eager mode only."""
        with without_autocast(x):
            return self._rounded(x, static, *aux, *tensors)


def is_batched(x: Tensor) -> bool:
    """Whether a body's input is wrapped by a vmap, where ``out=`` and ``_int_mm`` have no rule.

    ``torch.func.vmap`` never gets that far (see ``vmap`` below), but the older one inside
    ``torch.autograd`` does: ``is_grads_batched=True``, ``functional.jacobian(vectorize=True)``,
    gradcheck.
    """
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x)


def _compiled(multiply: Multiply, transposed: Multiply) -> Any:
    """The Function for a plain backward under torch.compile, which traces both bodies inline."""

    class Compiled(Function):
        # The arity is fixed, absent tensors None: Dynamo tells a forward with setup_context from
        # one without by counting parameters, and miscounts varargs.
        @staticmethod
        def forward(x: Tensor, static: Any, a: Slot, b: Slot, c: Slot, d: Slot) -> Tensor:
            return multiply(x, static, *[t for t in (a, b, c, d) if t is not None])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, ctx.static, a, b, c, d = inputs
            ctx.save_for_backward(a, b, c, d)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            tensors = [t for t in ctx.saved_tensors if t is not None]
            return transposed(g, ctx.static, *tensors), None, None, None, None, None

    return Compiled


def _eager_pair(multiply: Multiply, transposed: Multiply) -> tuple[Multiply, Multiply]:
    down: Multiply = _eager(multiply, lambda: up, lambda: down)
    up: Multiply = _eager(transposed, lambda: down, lambda: up)
    return down, up


def _eager(
    body: Multiply,
    adjoint: Callable[[], Multiply],
    tangent: Callable[[], Multiply],
    n_aux: int = 0,
) -> Multiply:
    """The op for eager mode; ``adjoint`` and ``tangent`` name those of its derivatives."""

    class Eager(Function):
        @staticmethod
        def forward(x: Tensor, static: Any, *tensors: Tensor) -> Tensor:
            return body(x, static, *tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.static = inputs[1]
            ctx.save_for_backward(*inputs[2 + n_aux :])
            ctx.save_for_forward(*inputs[2 + n_aux :])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            tensors = ctx.saved_tensors
            if any(ctx.needs_input_grad[2 + n_aux :]):
                raise FrozenBaseError(
                    "A gradient was asked for with respect to the tensors of a frozen base. "
                    "linear() differentiates with respect to its input alone; to train what a "
                    "base holds, differentiate through base.dequantize() instead."
                )
            dx = adjoint()(g, ctx.static, *tensors) if ctx.needs_input_grad[0] else None
            return (dx, None, *[None] * (n_aux + len(tensors)))

        @staticmethod
        def jvp(ctx: Any, tx: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
            return tangent()(tx, ctx.static, *ctx.saved_tensors)

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor, static: Any, *tensors: Tensor) -> Any:
            x_dim, dims = in_dims[0], in_dims[2:]
            if x_dim is not None and all(d is None for d in dims[n_aux:]):
                # The usual case, a shared base: the mapped axis becomes more rows of one GEMM.
                aux = [
                    a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
                    for a, d in zip(tensors[:n_aux], dims, strict=False)
                ]
                return run(x.movedim(x_dim, 0), static, *aux, *tensors[n_aux:]), 0

            # Bases that are themselves stacked: a product for each.
            def at(tensor: Tensor, dim: int | None, k: int) -> Tensor:
                return tensor if dim is None else tensor.select(dim, k)

            each = [
                run(at(x, x_dim, k), static, *map(at, tensors, dims, [k] * len(dims)))
                for k in range(info.batch_size)
            ]
            return torch.stack(each), 0

    run: Multiply = applied(Eager)
    return run
