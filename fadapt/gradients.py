"""Gradients by plain reverse mode: what ``torch.func`` gives, without its cost."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fadapt.errors import AdapterError


def value_and_grad(
    loss: Callable[..., Tensor], in_dims: int | tuple[Any, ...] | None = None
) -> Callable[..., tuple[Tensor, Any]]:
    """A function that returns a loss and its gradient in the first argument.

    Pure, as ``torch.func.grad_and_value`` is, but it runs plain autograd on detached copies of the
    leaves: no transform wraps the tensors, so a single small step is up to three times faster, and
    ``torch.utils.checkpoint`` works, which needs hooks that ``torch.func.grad`` forbids. Inside a
    transform (``vmap(value_and_grad(...))``) it is ``torch.func.grad_and_value``.

    With ``in_dims`` it is ``vmap(grad_and_value(loss), in_dims)``: K adapters in one step. The
    losses do not depend on each other's parameters, so the gradient of their sum is the stack of
    their gradients, and one backward finds it, outside of any transform.

    Args:
        loss: ``loss(params, *args, **kwargs)``, a tensor of one element.
        in_dims: as ``torch.func.vmap``'s, for ``loss``'s positional arguments; the parameters'
            must be 0 or a pytree of zeros. None for one adapter.

    Returns:
        ``f(params, *args, **kwargs) -> (loss, grads)``, both detached; ``grads`` is shaped as
        ``params``, zeros where the loss does not depend on a leaf. ``loss`` is ``[K]`` with
        ``in_dims``.

    Raises:
        AdapterError: with ``in_dims``, a loss of more than one element. (Torch raises without.)

    Example:
        >>> import torch, fadapt
        >>> f = fadapt.value_and_grad(lambda p, x: (p["w"] * x).sum())
        >>> f({"w": torch.ones(2)}, torch.tensor([3.0, 4.0]))
        (tensor(7.), {'w': tensor([3., 4.])})
        >>> many = {"w": torch.ones(3, 2)}
        >>> f = fadapt.value_and_grad(lambda p, x: (p["w"] * x).sum(), in_dims=(0, None))
        >>> f(many, torch.ones(2))[0]
        tensor([2., 2., 2.])
    """
    mapped = loss if in_dims is None else torch.func.vmap(loss, in_dims)

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            step = torch.func.grad_and_value(loss)
            step = step if in_dims is None else torch.func.vmap(step, in_dims)
            grads, value = step(params, *args, **kwargs)
            return value, grads
        leaves, whole = _flatten(params)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = mapped(whole(leaves), *args, **kwargs)
            if in_dims is not None and value.numel() != len(value):
                raise AdapterError(
                    f"the loss of each adapter must be one number; got {list(value.shape[1:])}. "
                    "Take its mean or its sum."
                )
            total = value if in_dims is None else value.sum()
        # In this thread. That of a GPU's own costs a small step more than its kernels do: it is
        # woken for each backward, and its caches are cold.
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        return value.detach(), whole(_filled(found, leaves))

    return run


def vjp(function: Callable[[Any], Any], params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A function's value at ``params``, and what takes a gradient back through it.

    What ``torch.func.vjp`` gives, by plain autograd, as :func:`value_and_grad` does it; inside a
    transform it is ``torch.func.vjp``. For what several steps share: prepare once, add up the
    gradients of micro-batches with respect to what was prepared, and bring them back once.

    Args:
        function: of a pytree of tensors, to another.
        params: a pytree of floating tensors.

    Returns:
        ``(value, back)``: the value, detached; and ``back(grads)``, which takes a pytree shaped as
        the value and returns one shaped as ``params``, zeros where the value does not depend on a
        leaf. It can be called more than once.

    Raises:
        AdapterError: by ``back``: a gradient that is not shaped as the value.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(8, 3), fadapt.OFT(block_size=4)
        >>> params = fadapt.init(method, model)
        >>> forward = fadapt.bind(model, method)
        >>> step = fadapt.value_and_grad(lambda p, x: forward(p, x).square().sum())
        >>> prepared, back = fadapt.vjp(forward.prepare, params)
        >>> one, two = (step(prepared, x)[1] for x in torch.ones(2, 5, 8))
        >>> grads = back(torch.utils._pytree.tree_map(torch.add, one, two))
        >>> grads[""].oft_R.shape
        torch.Size([2, 6])
    """
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        pulled: Any = torch.func.vjp(function, params)
        value, pull = pulled
        return value, lambda grads: pull(grads)[0]
    leaves, whole = _flatten(params)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        outputs, shaped = _flatten(function(whole(leaves)))
    reached = [n for n, output in enumerate(outputs) if output.requires_grad]

    def back(grads: Any) -> Any:
        given, _ = _flatten(grads)
        if [g.shape for g in given] != [output.shape for output in outputs]:
            wanted, got = ([list(t.shape) for t in tensors] for tensors in (outputs, given))
            raise AdapterError(f"a gradient is shaped as the value: expected {wanted}, got {got}.")
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(
                [outputs[n] for n in reached],
                leaves,
                [given[n] for n in reached],
                retain_graph=True,
                allow_unused=True,
            )
        return whole(_filled(found, leaves))

    return shaped([output.detach() for output in outputs]), back


def _filled(grads: Iterable[Tensor | None], leaves: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]


def _flatten(params: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a pytree, and what makes one of others; of an adapter, a dict of NamedTuples,
    in a tenth of the time that the general one takes."""
    if type(params) is dict:
        leaves: list[Any] = []
        for leaf in params.values():
            if not (isinstance(leaf, tuple) and all(type(part) is Tensor for part in leaf)):
                break
            leaves += leaf
        else:
            return leaves, lambda others: _like(params, iter(others))
    leaves, spec = tree_flatten(params)
    return leaves, lambda others: tree_unflatten(others, spec)


def _like(params: dict[Any, Any], leaves: Iterator[Any]) -> dict[Any, Any]:
    made = {}
    for path, leaf in params.items():
        parts = islice(leaves, len(leaf))
        make: Any = getattr(type(leaf), "_make", type(leaf))
        made[path] = make(parts)
    return made
