"""Every transform of torch.func over a forward, beside the same values by loops and plain autograd.

What a transform is held to, ``Case.reference``, is the same model in plain torch (``cases.Plain``).
"""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from torch.autograd import functional as plain
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import fadapt as fa


def each(c: Case) -> list[Any]:
    return fa.unstack(c.many)


def wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda p, x: wide(f(p, x)).square().mean()


def plain_grads(f: Callable[..., Tensor], p: Any, x: Tensor) -> tuple[Any, Tensor]:
    """The gradients of ``f(p, x)`` with respect to p and x, by plain autograd."""
    leaves, spec = tree_flatten((p, x))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(f(*tree_unflatten(leaves, spec)), leaves)
    return tree_unflatten(list(grads), spec)


def by_leaves(f: Callable[..., Any], p: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """``f(p)`` as a function of p's leaves, and the leaves."""
    leaves, spec = tree_flatten(p)
    return lambda *leaves: f(tree_unflatten(list(leaves), spec)), tuple(leaves)


def plain_jacobian(f: Callable[..., Tensor], p: Any) -> tuple[Tensor, ...]:
    return plain.jacobian(*by_leaves(f, p))


def plain_hessian(f: Callable[..., Tensor], p: Any) -> tuple[tuple[Tensor, ...], ...]:
    return plain.hessian(*by_leaves(f, p))


def plain_jvp(f: Callable[..., Tensor], p: Any, x: Tensor, tp: Any, tx: Tensor) -> Tensor:
    jacobian = plain_jacobian(lambda a: f(*a), (p, x))
    moves = zip(jacobian, tree_leaves((tp, tx)), strict=True)
    return sum((j.double() * t.double()).flatten(2).sum(-1) for j, t in moves)


def stacked(values: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *values)


class Outer(nn.Module):
    """A user's module that runs an adapted forward with its own parameters as the adapter."""

    def __init__(self, forward: fa.Forward, params: Any):
        super().__init__()
        self.leaves = nn.ParameterList(tree_leaves(params))
        self.spec = tree_flatten(params)[1]
        self.run = forward.__call__

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.run(tree_unflatten(list(self.leaves), self.spec), x)


def by_functional_call(f: fa.Forward, p: Any, x: Tensor) -> Tensor:
    outer = Outer(f, tree_map(torch.zeros_like, p))
    return functional_call(outer, {f"leaves.{k}": t for k, t in enumerate(tree_leaves(p))}, x)


def slope(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar made of a gradient: its own gradient is of second order."""
    return lambda p, x: sum(wide(t).square().sum() for t in tree_leaves(grad(loss(f))(p, x)))


def plain_slope(f: Callable[..., Tensor], p: Any, x: Tensor) -> Any:
    leaves, spec = tree_flatten(p)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(loss(f)(tree_unflatten(leaves, spec), x), leaves, create_graph=True)
    second = torch.autograd.grad(sum(wide(g).square().sum() for g in first), leaves)
    return tree_unflatten(list(second), spec)


# name: (by torch.func over the forward, by loops and plain autograd over the reference, order)
TRANSFORMS: dict[str, tuple[Callable[[Case], Any], Callable[[Case], Any], int]] = {
    "call": (lambda c: c.forward(c.params, c.x), lambda c: c.reference(c.params, c.x), 0),
    "more_axes": (
        lambda c: c.forward(c.params, c.xs[None]),
        lambda c: c.reference(c.params, c.xs[None]),
        0,
    ),
    "backward": (
        lambda c: plain_grads(loss(c.forward), c.params, c.x),
        lambda c: plain_grads(loss(c.reference), c.params, c.x),
        1,
    ),
    "grad": (
        lambda c: grad(loss(c.forward), argnums=(0, 1))(c.params, c.x),
        lambda c: plain_grads(loss(c.reference), c.params, c.x),
        1,
    ),
    "vjp": (
        lambda c: vjp(c.forward, c.params, c.x)[1](c.tangents[1][:, :8]),
        lambda c: plain_grads(
            lambda p, x: (c.reference(p, x) * c.tangents[1][:, :8]).sum(), c.params, c.x
        ),
        1,
    ),
    "vmap_adapters": (
        lambda c: vmap(c.forward, in_dims=(0, None))(c.many, c.x),
        lambda c: stacked([c.reference(p, c.x) for p in each(c)]),
        0,
    ),
    "vmap_inputs": (
        lambda c: vmap(c.forward, in_dims=(None, 0))(c.params, c.xs),
        lambda c: stacked([c.reference(c.params, x) for x in c.xs]),
        0,
    ),
    "vmap_inputs_inner_axis": (
        lambda c: vmap(c.forward, in_dims=(None, 1), out_dims=1)(c.params, c.xs),
        lambda c: c.reference(c.params, c.xs),
        0,
    ),
    "vmap_both": (
        lambda c: vmap(c.forward)(c.many, c.xs),
        lambda c: stacked([c.reference(p, x) for p, x in zip(each(c), c.xs, strict=True)]),
        0,
    ),
    "vmap_of_vmap": (
        lambda c: vmap(vmap(c.forward, (None, 0)), (0, None))(c.many, c.xs),
        lambda c: stacked([stacked([c.reference(p, x) for x in c.xs]) for p in each(c)]),
        0,
    ),
    "vmap_of_grad": (
        lambda c: vmap(grad(loss(c.forward), argnums=(0, 1)))(c.many, c.xs),
        lambda c: stacked(
            [plain_grads(loss(c.reference), p, x) for p, x in zip(each(c), c.xs, strict=True)]
        ),
        1,
    ),
    "per_sample_grad": (
        lambda c: vmap(grad(loss(c.forward)), in_dims=(None, 0))(c.params, c.x),
        lambda c: stacked([plain_grads(loss(c.reference), c.params, x)[0] for x in c.x]),
        1,
    ),
    "grad_of_vmap": (
        lambda c: grad(lambda many: vmap(loss(c.forward))(many, c.xs).sum())(c.many),
        lambda c: stacked(
            [plain_grads(loss(c.reference), p, x)[0] for p, x in zip(each(c), c.xs, strict=True)]
        ),
        1,
    ),
    "jvp": (
        lambda c: jvp(c.forward, (c.params, c.x), c.tangents),
        lambda c: (
            c.reference(c.params, c.x),
            plain_jvp(c.reference, c.params, c.x, *c.tangents),
        ),
        1,
    ),
    "vmap_of_jvp": (
        lambda c: vmap(lambda p, x, t: jvp(c.forward, (p, x), t)[1], (0, 0, None))(
            c.many, c.xs, c.tangents
        ),
        lambda c: stacked(
            [plain_jvp(c.reference, p, x, *c.tangents) for p, x in zip(each(c), c.xs, strict=True)]
        ),
        1,
    ),
    "jvp_of_vmap": (
        lambda c: jvp(lambda x: vmap(c.forward, (0, None))(c.many, x), (c.x,), (c.tangents[1],))[1],
        lambda c: stacked(
            [
                plain_jvp(c.reference, p, c.x, tree_map(torch.zeros_like, p), c.tangents[1])
                for p in each(c)
            ]
        ),
        1,
    ),
    "jacrev": (
        lambda c: jacrev(c.forward, argnums=(0, 1))(c.params, c.x),
        lambda c: plain_jacobian(lambda a: c.reference(*a), (c.params, c.x)),
        1,
    ),
    "jacfwd": (
        lambda c: jacfwd(c.forward, argnums=(0, 1))(c.params, c.x),
        lambda c: plain_jacobian(lambda a: c.reference(*a), (c.params, c.x)),
        1,
    ),
    "hessian": (
        lambda c: hessian(loss(c.forward))(c.params, c.x),
        lambda c: plain_hessian(lambda p: loss(c.reference)(p, c.x), c.params),
        2,
    ),
    "grad_of_grad": (
        lambda c: grad(slope(c.forward))(c.params, c.x),
        lambda c: plain_slope(c.reference, c.params, c.x),
        2,
    ),
    "functional_call": (
        lambda c: by_functional_call(c.forward, c.params, c.x),
        lambda c: 2 * c.reference(c.params, c.x),
        0,
    ),
    "checkpoint": (
        lambda c: fa.value_and_grad(
            loss(lambda p, x: checkpoint(c.forward, p, x, use_reentrant=False))
        )(c.params, c.x),
        lambda c: (
            loss(c.reference)(c.params, c.x),
            plain_grads(loss(c.reference), c.params, c.x)[0],
        ),
        1,
    ),
}


def error(got: Any, want: Any) -> float:
    """The largest difference of any leaf, as a share of the largest element of that leaf."""
    both = (tree_leaves(got), tree_leaves(want))
    pairs = [(a.detach(), b.detach()) for a, b in zip(*both, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    assert all(b.count_nonzero() for _, b in pairs), "a reference of zeros shows nothing"
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)
