"""OFT's build and rotation as one op: it is the two that it replaces, under every transform."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import fadapt as fa
import fadapt.cayley
from fadapt.cayley import rotation, rotations
from fadapt.kernels import oft_cpu
from fadapt.kernels.oft_fused import watched
from fadapt.kernels.oft_turn import rotate, turn_by
from fadapt.testing import assert_pure

EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
OWN = (1.0, -2.0, 2.0, -2.0, 2.0)
PEFT = (1.0, 2.0, 2.0, 2.0, 1.0)
FORMS = [None, OWN, PEFT, (1.0, -2.0), (1.0, 2.0, 1.0), (1.0, -2.0, 2.0, -2.0)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_turned(coefficients: Any) -> Any:
    """However many rows there are."""

    def run(x: Tensor, v: Tensor) -> Tensor:
        if watched():
            return rotate(x, rotation(v, coefficients))
        return oft_cpu.turned(x, v, coefficients)

    return run


def by_two(coefficients: Any) -> Any:
    return lambda x, v: rotate(x, fadapt.cayley.plain(v, coefficients))


@pytest.mark.parametrize("size", [4, 16, 37])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("coefficients", FORMS, ids=str)
def test_value_and_gradients(coefficients: Any, shared: bool, size: int):
    r, t = 1 if shared else 3, 5
    v = gaussian(5, r, size * (size - 1) // 2) / (4 * size**0.5)
    x, g = gaussian(5, t, 3 * size, seed=1), gaussian(5, t, 3 * size, seed=2)
    for x_needs in (True, False):
        found = []
        for f, kind in (
            (by_turned(coefficients), torch.float32),
            (vmap(by_two(coefficients)), torch.float64),
        ):
            copies = (t.to(kind, copy=True) for t in (x, v))
            leaves = [t.requires_grad_(n) for t, n in zip(copies, (x_needs, True), strict=True)]
            y = f(*leaves)
            found.append([y, *torch.autograd.grad(y, leaves[1 - x_needs :], g.to(kind))])
        for got, want in zip(*found, strict=True):
            assert got.dtype == torch.float32
            # A few products of sums of at most 37 terms, each rounded as it is added.
            assert (got - want).abs().max() <= 16 * EPS * want.abs().max()


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_every_transform(coefficients: Any, shared: bool):
    v, x = 0.1 * gaussian(2, 1 if shared else 3, 6), gaussian(4, 12, seed=1)
    xs = gaussian(2, 4, 12, seed=2)

    def results(f: Any, kind: torch.dtype) -> list[Tensor]:
        (v_, x_, xs_) = (t.to(kind) for t in (v, x, xs))

        def loss(x: Tensor, v: Tensor) -> Tensor:
            y = f(x, v)  # not its norm, which no rotation moves
            return (y * y.cos()).sum()

        def cubes(grads: Any) -> Tensor:  # nor of its gradient, which is rotated back
            return sum(t.pow(3).sum() for t in grads)

        def slope(x: Tensor, v: Tensor) -> Tensor:
            return cubes(grad(loss, (0, 1))(x, v))

        def plain(*given: Tensor) -> Any:
            return torch.autograd.grad(loss(*given), given, create_graph=True)

        def dual() -> Tensor:
            with forward_ad.dual_level():
                pair = (forward_ad.make_dual(t, t.flip(0)) for t in (x_, v_[0]))
                return forward_ad.unpack_dual(f(*pair)).tangent.clone()

        leaves = [t.clone().requires_grad_() for t in (x_, v_[0])]
        first = plain(*leaves)
        several = torch.stack([x_, x_.flip(0)])
        return tree_leaves(
            [
                f(x_, v_[0]),
                first,
                torch.autograd.grad(cubes(first), leaves),
                torch.autograd.grad(loss(leaves[0], v_[0]), leaves[0]),
                torch.autograd.grad(f(*leaves), leaves, several, is_grads_batched=True),
                dual(),
                grad(loss, (0, 1))(x_, v_[0]),
                grad(slope, (0, 1))(x_, v_[0]),
                torch.func.jvp(f, (x_, v_[0]), (x_.flip(0), v_[1])),
                vmap(f, (None, 0))(x_, v_),
                vmap(f, (0, None), 1)(xs_, v_[0]),
                vmap(vmap(f, (0, None)), (None, 0))(xs_, v_),
                vmap(vmap(f, (None, 0)), (0, None))(xs_, v_),
                vmap(grad(loss, (0, 1)))(xs_, v_),
                torch.autograd.grad(
                    vmap(loss, (None, 0))(leaves[0], leaves[1].expand_as(v_)).sum(), leaves
                ),
                torch.func.hessian(loss, 1)(x_, v_[0]),
            ]
        )

    got = results(by_turned(coefficients), torch.float32)
    want = results(by_two(coefficients), torch.float64)
    for a, b in zip(got, want, strict=True):
        # Second derivatives are sums of a hundred terms of both signs.
        assert (a - b).abs().max() <= 100 * EPS * b.abs().max()


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_same_bits_pure_and_what_it_keeps(coefficients: Any):
    v, x = (0.05 * gaussian(3, 16, 120)).float(), gaussian(3, 8, 256).float()
    y = turn_by(x, v, coefficients)
    assert y is not None
    assert torch.equal(y, rotate(x, rotation(v, coefficients)))
    assert_pure(lambda: by_turned(coefficients)(x, v), [x, v])
    kept: list[Tensor] = []
    v.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by_turned(coefficients)(x, v)
    # The exact form keeps R as well, which a series builds again in the cache.
    assert [t.numel() for t in kept] == [
        x.numel(),
        v.numel(),
        *[3 * 16**3] * (coefficients is None),
    ]


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_of_wrappers(coefficients: Any):
    v, x = 0.1 * gaussian(3, 6), gaussian(4, 12, seed=1)

    def results(f: Any, kind: torch.dtype) -> list[Tensor]:
        leaves, made = [t.to(kind, copy=True).requires_grad_() for t in (x, v)], []

        def leaking(x: Tensor, v: Tensor) -> Tensor:
            made.extend([x.sin(), v.sin()])
            return x.sum()

        grad(leaking)(*leaves)  # what is made has outlived its transform
        pair = f(x.to(kind), TwoTensor(v.to(kind), 2 * v.to(kind)))
        return [*torch.autograd.grad(f(*made).pow(3).sum(), leaves), pair.a, pair.b]

    def of_several(x: Tensor, v: Tensor) -> Tensor:
        return rotate(x, rotations([v, v], coefficients)[1])

    want = results(by_two(coefficients), torch.float64)
    for f in (by_turned(coefficients), of_several):
        for a, b in zip(results(f, torch.float32), want, strict=True):
            assert (a - b).abs().max() <= 16 * EPS * b.abs().max()


def test_where_it_is_taken():
    v, x = gaussian(4, 6).float(), gaussian(4, 16).float()
    assert turn_by(x, v, OWN) is not None
    assert turn_by(x.repeat(2, 1), v, OWN) is None  # products of blocks are the cheaper
    assert turn_by(x.repeat(2, 1), v, None) is not None
    assert turn_by(x.repeat(4, 1), v, None) is None
    assert turn_by(x.bfloat16(), v, None) is None
    assert turn_by(x.double(), v.double(), None) is None
    assert turn_by(x[:0], v, None) is None
    kept: list[Tensor] = []
    xs, v = x.repeat(8, 1, 1), v.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vmap(lambda x: turn_by(x, v, OWN))(xs)  # of each sample few rows, and many of all
    assert any(t.shape[-2:] == (4, 4) and t.numel() == 4 * 4**2 for t in kept)  # R: two ops
    with torch.autocast("cpu"):
        assert turn_by(x, v, None) is None


@pytest.mark.parametrize("cayley", ["exact", "neumann"])
def test_a_large_layer_of_a_forward(cayley: str):
    width = 1024  # 32 blocks, of 4 adapters: large
    model = nn.Sequential(nn.Linear(width, 4, bias=False), nn.Linear(4, 4))
    method = fa.OFT(block_size=32, cayley=cayley, targets=["0"])
    forward = fa.bind(model, method)
    many = {"0": fa.OFTParams(0.02 * gaussian(5, 32, 496).float())}
    x = gaussian(5, 3, width, seed=1).float()

    def loss(params: Any, x: Tensor) -> Tensor:
        return forward(params, x).square().sum()

    def prepared(params: Any, x: Tensor) -> Tensor:
        return loss(forward.prepare(params), x)

    (value, grads), (want, wanted) = (
        fa.value_and_grad(f, in_dims=(0, 0))(many, x) for f in (loss, prepared)
    )
    assert torch.equal(value, want)
    of, other = grads["0"].oft_R, wanted["0"].oft_R
    # Sums of 32 x 3 products, in another order, of numbers as large as the largest.
    assert (of - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * other.abs().max()


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_rotations_of_several_layers(coefficients: Any):
    several = [0.3 * gaussian(r, 6, seed=r) for r in (1, 3, 2)]

    def results(f: Any) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in several]
        blocks = f(leaves)
        loss = sum(((n + 1) * R.square() * R).sum() for n, R in enumerate(blocks))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
        only = torch.autograd.grad(f(leaves)[1].sum(), leaves, allow_unused=True)[1]
        stacked = f([torch.stack([v, v.sin()]) for v in leaves])
        by_stacks = torch.autograd.grad(sum(R.pow(3).sum() for R in stacked), leaves)
        return [*blocks, *first, *second, only, *stacked, *by_stacks]

    got = results(lambda v: rotations(v, coefficients))
    want = results(lambda v: [fadapt.cayley.plain(one, coefficients) for one in v])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1000 * EPS64 * b.abs().max()


def test_what_several_layers_keep():
    kept: list[Tensor] = []
    several = [gaussian(r, 6, seed=r).requires_grad_() for r in (1, 3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotations(several, None)
    assert any(t.shape == (4, 4, 4) for t in kept)  # R, which backward frees
    blocks = rotations(several, None)
    loss = blocks[1].sum()
    with torch.no_grad():
        blocks[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
