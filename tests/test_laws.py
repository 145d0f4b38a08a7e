"""Laws 1 to 4 and 8 of every base x method x transform. The rows are in cases.py.

Each transform of torch.func over the fast forward is held, by value, against loops and plain
reverse-mode autograd over ``Plain``, the same model written in plain torch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    BASES,
    METHODS,
    N_HIDDEN,
    N_IN,
    N_OUT,
    BaseRow,
    Case,
    K,
    MethodRow,
    dense,
    eps_of,
    make,
    randomized,
)
from torch import Tensor, nn
from torch.autograd import functional as plain
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import fadapt as fa
from fadapt.testing import assert_pure

TABLE = [pytest.param(b, m, id=f"{b.name}-{m.name}") for b in BASES for m in METHODS]
table = pytest.mark.parametrize(("row", "kind"), TABLE)


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


def tangents(c: Case) -> tuple[Any, Tensor]:
    g = torch.Generator().manual_seed(7)
    return tree_map(lambda t: torch.randn(t.shape, generator=g).to(t), (c.params, c.x))


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
    return lambda p, x: sum(wide(t).square().sum() for t in grad(loss(f))(p, x).values() for t in t)


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
        lambda c: vjp(c.forward, c.params, c.x)[1](tangents(c)[1][:, :8]),
        lambda c: plain_grads(
            lambda p, x: (c.reference(p, x) * tangents(c)[1][:, :8]).sum(), c.params, c.x
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
        lambda c: jvp(c.forward, (c.params, c.x), tangents(c)),
        lambda c: (
            c.reference(c.params, c.x),
            plain_jvp(c.reference, c.params, c.x, *tangents(c)),
        ),
        1,
    ),
    "vmap_of_jvp": (
        lambda c: vmap(lambda p, x, t: jvp(c.forward, (p, x), t)[1], (0, 0, None))(
            c.many, c.xs, tangents(c)
        ),
        lambda c: stacked(
            [plain_jvp(c.reference, p, x, *tangents(c)) for p, x in zip(each(c), c.xs, strict=True)]
        ),
        1,
    ),
    "jvp_of_vmap": (
        lambda c: jvp(lambda x: vmap(c.forward, (0, None))(c.many, x), (c.x,), (tangents(c)[1],))[
            1
        ],
        lambda c: stacked(
            [
                plain_jvp(c.reference, p, c.x, tree_map(torch.zeros_like, p), tangents(c)[1])
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
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert all(b.count_nonzero() for _, b in pairs), "a reference of zeros shows nothing"
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", TRANSFORMS)
@table
def test_transform(row: BaseRow, kind: MethodRow, name: str):
    c = make(row, kind)
    got, want, order = TRANSFORMS[name]
    # Law 8: a transform leaves its inputs, the model and all global state as they were.
    value = assert_pure(lambda: got(c), c.model, c.forward, c.params, c.many, c.x, c.xs)
    # Two layers, and for each order of derivative two more on the way back; every result, of 16
    # products at most, is rounded to the row's dtype: eps / 2 each, grown by the next layers.
    share = error(value, want(c))
    assert share <= (4, 8, 16)[order] * eps_of(row)


@table
def test_law_1_a_fresh_adapter_changes_nothing(row: BaseRow, kind: MethodRow):
    c = make(row, kind)
    fresh = fa.init(c.method, c.model, generator=torch.Generator().manual_seed(5))
    assert torch.equal(c.forward(fresh, c.x), c.forward(None, c.x))
    ys = vmap(c.forward)(fa.stack([fresh] * K), c.xs)
    assert torch.equal(ys, vmap(lambda x: c.forward(None, x))(c.xs))


@pytest.mark.parametrize("row", BASES, ids=lambda b: b.name)
def test_law_2_without_an_adapter_it_is_the_model_itself(row: BaseRow):
    layer = row.layer(N_IN, N_HIDDEN)
    forward = fa.bind(layer, METHODS[0].method)
    g = torch.Generator().manual_seed(0)
    for shape in ((N_IN,), (1, N_IN), (5, N_IN), (2, 3, N_IN), (0, N_IN)):
        x = torch.randn(shape, generator=g).to(row.dtype)
        got = assert_pure(lambda: forward(None, x), layer, forward, x)
        assert got.dtype == row.dtype
        assert got.shape == (*shape[:-1], N_HIDDEN)
        if not x.numel():  # which some vendors' layers refuse
            continue
        with torch.no_grad():
            want = layer(x)
        if row.bound == 0:
            assert torch.equal(got, want)
        else:
            assert error(got, want) <= row.bound


@table
def test_law_3_vmap_is_the_loop_and_unstack_inverts_stack(row: BaseRow, kind: MethodRow):
    c = make(row, kind)
    adapters = fa.unstack(c.many)
    again = fa.stack(adapters)
    assert all(map(torch.equal, tree_leaves(again), tree_leaves(c.many)))
    ys = vmap(c.forward)(c.many, c.xs)
    grads = fa.unstack(vmap(grad(loss(c.forward)))(c.many, c.xs))
    for p, x, y, g in zip(adapters, c.xs, ys, grads, strict=True):
        # The same sums, in one GEMM of K x 3 rows instead of K of 3: another order, so an eps.
        assert error(y, c.forward(p, x)) <= 4 * eps_of(row)
        assert error(g, grad(loss(c.forward))(p, x)) <= 8 * eps_of(row)


@pytest.mark.parametrize("kind", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("row", [b for b in BASES if b.gradcheck], ids=lambda b: b.name)
def test_law_4_gradcheck_in_float64(row: BaseRow, kind: MethodRow):
    layer = row.layer(N_HIDDEN, 4)
    forward = fa.bind(layer, kind.method)
    fresh = fa.init(kind.method, layer, generator=torch.Generator().manual_seed(0))
    leaves, spec = tree_flatten(tree_map(lambda t: t.double(), randomized(fresh, 0)))
    x = torch.randn(2, N_HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, *leaves)]

    def f(x: Tensor, *leaves: Tensor) -> Tensor:
        return forward(tree_unflatten(list(leaves), spec), x)

    assert gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", METHODS, ids=lambda m: m.name)
def test_law_7_applying_is_multiplying_by_the_merged_weight(kind: MethodRow):
    layer = dense(N_IN, N_OUT, torch.float64)
    base, method = fa.base_of(layer), kind.method
    fresh = fa.init(method, layer, generator=torch.Generator().manual_seed(0))
    (p,) = tree_map(lambda t: t.double(), randomized(fresh, 0)).values()
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = x @ method.merge(base.dequantize(), p).mT + method.merge_bias(base.bias, p)
    assert error(method.apply(base, p, x), want) <= 16 * torch.finfo(torch.float64).eps
