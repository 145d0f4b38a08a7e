"""``autograd.Function`` with ``setup_context``, without what its ``apply`` costs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function, forward_ad

_functorch = torch._C._functorch


class VmapInfo(NamedTuple):
    """What a Function's ``vmap`` is told, as torch tells it."""

    batch_size: int
    randomness: str


def applied(function: type[Function]) -> Callable[..., Any]:
    """``function.apply``, cheaper in eager mode; for a Function of one output.

    The apply of a Function with ``setup_context`` inspects forward's signature at every call, which
    costs more than a small product. So its signature is kept; outside of the transforms, which
    alone need ``setup_context``, a Function without it runs; where nothing is to be recorded
    (inference, a plain backward), its forward alone; and under ``vmap`` its rule.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)

    class Plain(function):  # type: ignore[misc, valid-type]
        setup_context = Function.setup_context

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            function.setup_context(ctx, args, output)
            return output

    def run(*args: Any) -> Any:
        level = _functorch.peek_interpreter_stack()
        if level is not None:
            if level.key() == _functorch.TransformType.Vmap:
                return mapped(function, run, args)
            return function.apply(*args)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return forward(*args)
        return apply(*[_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])

    plain: Any = Plain
    apply: Any = super(Function, plain).apply  # direct(Plain) would be one call more
    return run


def direct(function: Any) -> Callable[..., Any]:
    """``function.apply`` outside of the transforms, for a Function without ``setup_context``, which
    torch's own apply, in Python, looks for."""
    apply: Any = super(Function, function).apply

    def run(*args: Any) -> Any:
        # A tensor that outlived its transform hides what it was made of.
        return apply(*[_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])

    return run


def mapped(function: Any, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``function`` one level of ``vmap`` further down, by its rule: what torch's dispatcher does
    (``custom_function_call_vmap``), which takes several times as long over it as a kernel does."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    below = [
        # Of a transform inside of this one that is over: a pull-back called after its vjp.
        _functorch._unwrap_batched(_functorch.unwrap_if_dead(a), level)
        if isinstance(a, Tensor)
        else (a, None)
        for a in args
    ]
    dims = tuple(dim for _, dim in below)
    values = [value for value, _ in below]
    if all(dim is None for dim in dims):
        with interpreter.lower():
            return run(*values)
    info = VmapInfo(interpreter.batch_size(), interpreter.randomness())
    with interpreter.lower():
        output, dim = function.vmap(info, dims, *values)
    return output if dim is None else _functorch._add_batch_dim(output, dim, level)
