"""Gradients by plain reverse mode: ``torch.func.grad_and_value``'s result without its cost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def value_and_grad(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Any]]:
    """A function that returns a loss and its gradient in the first argument.

    Pure, as ``torch.func.grad_and_value`` is, but it runs plain autograd on detached copies of the
    leaves: no transform wraps the tensors, so a single small step is up to three times faster, and
    ``torch.utils.checkpoint`` works, which needs hooks that ``torch.func.grad`` forbids. Inside a
    transform (``vmap(value_and_grad(...))``) it is ``torch.func.grad_and_value``.

    Args:
        loss: ``loss(params, *args, **kwargs)``, a tensor of one element.

    Returns:
        ``f(params, *args, **kwargs) -> (loss, grads)``, both detached; ``grads`` is shaped as
        ``params``, zeros where the loss does not depend on a leaf.

    Example:
        >>> import torch, fadapt
        >>> f = fadapt.value_and_grad(lambda p, x: (p["w"] * x).sum())
        >>> f({"w": torch.ones(2)}, torch.tensor([3.0, 4.0]))
        (tensor(7.), {'w': tensor([3., 4.])})
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            grads, value = torch.func.grad_and_value(loss)(params, *args, **kwargs)
            return value, grads
        leaves, spec = tree_flatten(params)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = loss(tree_unflatten(leaves, spec), *args, **kwargs)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)
        ]
        return value.detach(), tree_unflatten([g.detach() for g in grads], spec)

    return run
