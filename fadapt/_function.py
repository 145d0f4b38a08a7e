"""``autograd.Function`` with ``setup_context``, without what its ``apply`` costs."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function, forward_ad


def applied(function: type[Function]) -> Callable[..., Any]:
    """``function.apply``, cheaper in eager mode.

    The apply of a Function with ``setup_context`` inspects forward's signature at every call, which
    costs more than a small product. So its signature is kept; outside of the transforms, which
    alone need ``setup_context``, a Function without it runs; and where nothing is to be recorded
    (inference, a plain backward), its forward alone.
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
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return forward(*args)
        return Plain.apply(*args)

    return run
