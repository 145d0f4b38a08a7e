"""The GPU's kernels equal the plain torch beside them, and so do their derivatives.

They run on a GPU; with ``TRITON_INTERPRET=1``, on a CPU as well, by Triton's interpreter (which
reads no bfloat16).
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap

import fadapt as fa
from fadapt.cayley import plain
from fadapt.method import ready

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from fadapt.kernels import dora_gpu, oft_gpu  # noqa: E402

# Of a thread of autograd's own, whose first product finds no context yet.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
DEVICE = "cpu" if INTERPRETED else "cuda"
# Blocks are built of a few products, of up to 128 terms each, whose errors add like a random walk.
EPS = 2 * torch.finfo(torch.float32).eps
SERIES = {
    "exact": None,
    "two": (1.0, -2.0),
    "four": (1.0, -2.0, 2.0, -2.0),
    "nine": (1.0, *(2.0 * (-1) ** k for k in range(1, 9))),
    "ten": (1.0, *[2.0] * 8, 1.0),
    "own": (1.0, -2.0, 2.0, -2.0, 2.0),
    "peft": (1.0, 2.0, 2.0, 2.0, 1.0),
}


def gaussian(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def share(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("size", [4, 20, 32, 64, 128])
@pytest.mark.parametrize("series", SERIES)
def test_r_and_its_gradient(series: str, size: int, std: float):
    coefficients = SERIES[series]
    if coefficients is not None and std == 1.0:
        std = 0.5 / size**0.5  # where the series is of any use
    vectors = gaussian(2, 3, size * (size - 1) // 2, std=std)
    wide = vectors.double().requires_grad_()
    want = plain(wide, coefficients)
    R = oft_gpu.build(vectors, coefficients)
    assert share(R, want.detach()) <= 8 * EPS
    g = gaussian(*R.shape, seed=1)
    (slope,) = torch.autograd.grad(want, wide, g.double(), retain_graph=True)
    got = oft_gpu.build_backward(vectors, R if series == "exact" else None, g, coefficients)
    assert share(got, slope) <= 16 * EPS
    # Of one block's vectors, and several gradients of its R: what jacrev's vmap hands it.
    one, again = vectors[:1].expand_as(vectors), R[:1].expand_as(R)
    (slope,) = torch.autograd.grad(want[:1].expand_as(want), wide, g.double())
    got = oft_gpu.build_backward(one, again if series == "exact" else None, g, coefficients)
    assert share(got.sum(0), slope[0]) <= 32 * EPS
    if series == "exact":
        eye = torch.eye(size, device=DEVICE)
        assert (R @ R.mT - eye).abs().max() <= 8 * EPS
        assert torch.equal(oft_gpu.build(0 * vectors, None), eye.expand_as(R))


def apart(x: Tensor, R: Tensor) -> Tensor:
    """What ``rotate`` must equal."""
    split = x.unflatten(-1, (-1, R.shape[-1]))
    return torch.einsum("...ri,rij->...rj", split, R.expand(split.shape[-2], -1, -1)).flatten(-2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [4, 20, 32, 128])
def test_a_rotated_activation_and_every_derivative(size: int, shared: bool):
    x, R = gaussian(2, 5, 3 * size), gaussian(1 if shared else 3, size, size, seed=1)
    tx, tR = gaussian(*x.shape, seed=2), gaussian(*R.shape, seed=3)
    assert share(oft_gpu.rotate(x, R), apart(x.double(), R.double())) <= 2 * EPS

    def loss(f):
        return lambda x, R: f(x, R).square().sum()

    transforms = [
        lambda f, x, R, tx, tR: grad(loss(f), (0, 1))(x, R),
        lambda f, x, R, tx, tR: jvp(f, (x, R), (tx, tR)),
        lambda f, x, R, tx, tR: grad(lambda x, R: grad(loss(f))(x, R).square().sum(), (0, 1))(x, R),
        lambda f, x, R, tx, tR: vmap(grad(loss(f), (0, 1)), (0, None))(x, R),
        lambda f, x, R, tx, tR: vmap(f, (None, 0))(x, torch.stack([R, tR])),
        lambda f, x, R, tx, tR: vmap(f, (0, 0), 1)(x, torch.stack([R, tR])),
        lambda f, x, R, tx, tR: vmap(grad(loss(f), (0, 1)), (0, 0))(x, torch.stack([R, tR])),
        lambda f, x, R, tx, tR: grad(
            lambda x, R: vmap(f, (0, 0), 1)(x, torch.stack([R, 2 * R])).square().sum(), (0, 1)
        )(x, R),
        lambda f, x, R, tx, tR: jvp(grad(loss(f), (0, 1)), (x, R), (tx, tR)),
    ]
    inputs = x, R, tx, tR
    for k, transform in enumerate(transforms):
        got = torch.utils._pytree.tree_leaves(transform(oft_gpu.rotate, *inputs))
        want = torch.utils._pytree.tree_leaves(transform(apart, *(t.double() for t in inputs)))
        for a, b in zip(got, want, strict=True):
            assert share(a, b) <= 16 * EPS, k


def test_each_of_several_blocks_takes_its_rows():
    x, R = gaussian(6, 2, 12), gaussian(3, 3, 4, 4, seed=1)  # two rows each

    def one_by_one(x, R):
        return torch.cat([apart(a, b) for a, b in zip(x.split(2), R, strict=True)])

    def loss(f):
        return lambda x, R: f(x, R).square().sum()

    wide = x.double(), R.double()
    assert share(oft_gpu.rotate(x, R), one_by_one(*wide)) <= 2 * EPS
    for transform in (
        lambda f: grad(loss(f), (0, 1)),
        lambda f: grad(lambda x, R: grad(loss(f))(x, R).square().sum(), (0, 1)),
        lambda f: lambda x, R: vmap(grad(loss(f), (0, 1)), (0, None))(torch.stack([x, 2 * x]), R),
        lambda f: (
            lambda x, R: vmap(grad(loss(f), (0, 1)), (None, 1))(x, torch.stack([R, 2 * R], 1))
        ),
    ):
        got, want = transform(oft_gpu.rotate)(x, R), transform(one_by_one)(*wide)
        assert all(share(a, b) <= 16 * EPS for a, b in zip(got, want, strict=True))


def test_jacobians_and_batched_gradients():
    x, R = gaussian(2, 8), gaussian(2, 4, 4, seed=1)
    wide = x.double(), R.double()
    for transform in (jacrev, hessian):
        got = transform(oft_gpu.rotate, (0, 1))(x, R)
        want = transform(apart, (0, 1))(*wide)
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
            assert float((a - b).abs().max()) <= 16 * EPS * float(1 + b.abs().max())
    y = oft_gpu.rotate(x, R.requires_grad_())
    several = gaussian(3, *y.shape, seed=2)
    (got,) = torch.autograd.grad(y, R, several, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, R, g, retain_graph=True)[0] for g in several]
    assert share(got, torch.stack(want).double()) <= 2 * EPS


@pytest.mark.parametrize("size", [4, 20, 64])
@pytest.mark.parametrize("series", [name for name in SERIES if name != "exact"])
def test_an_activation_turned_by_vectors_and_every_derivative(series: str, size: int):
    coefficients = SERIES[series]
    x, v = gaussian(2, 35, 2 * size), gaussian(2, size * (size - 1) // 2, std=0.5 / size**0.5)
    xs, vs = torch.stack([x, 2 * x]), torch.stack([v, -v])
    assert oft_gpu.turns(x, v, coefficients)

    def turned(x, v):
        return oft_gpu.turned(x, v, coefficients)

    def by_two(x, v):
        return apart(x, plain(v, coefficients))

    def slopes(y, *inputs):
        return torch.autograd.grad(y.square().sum(), inputs, create_graph=True)

    def results(f, x, v, xs, vs):
        x, v, xs, vs = (t.clone().requires_grad_() for t in (x, v, xs, vs))
        yield f(x, v)
        yield from slopes(f(x, v), x, v)
        yield from slopes(f(x.detach(), v), v)
        yield from slopes(f(x, v.detach()), x)
        yield from slopes(slopes(f(x, v), v)[0], x, v)
        yield from slopes(vmap(f)(xs, vs), xs, vs)
        yield from slopes(vmap(f, (0, None), 1)(xs, v), xs, v)
        yield from slopes(vmap(f, (None, 1))(x, vs.mT.movedim(1, 2)), x, vs)
        yield from slopes(vmap(vmap(f), (None, 0))(xs, torch.stack([vs, 2 * vs])), xs, vs)
        y, several = f(x, v), torch.stack([x.detach().roll(1, 1), 3 * x.detach().flip(0)])
        yield from torch.autograd.grad(y, (x, v), several, is_grads_batched=True)

    got = list(results(turned, x, v, xs, vs))
    want = list(results(by_two, *(t.double() for t in (x, v, xs, vs))))
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert share(a.detach(), b.detach()) <= 16 * EPS, k


def test_when_vectors_turn():
    own, x, v = SERIES["own"], gaussian(3, 64), gaussian(2, 32 * 31 // 2)
    assert oft_gpu.turns(x, v, own)
    assert oft_gpu.turns(x.half(), v, own)
    assert not oft_gpu.turns(x, v, None)
    assert not oft_gpu.turns(x, v, (1.0, 3.0, 2.0))
    assert not oft_gpu.turns(x, v[:1], own)  # one block for all
    assert not oft_gpu.turns(x, v.double(), own)
    assert not oft_gpu.turns(x[:0], v, own)
    assert not oft_gpu.turns(x.expand(400, 3, 64), v, own)
    assert not oft_gpu.turns(gaussian(3, 128), gaussian(1, 128 * 127 // 2), own)


@pytest.mark.skipif(INTERPRETED, reason="of a forward it knows nothing")
def test_a_forward_that_turns_by_vectors():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32)).to(DEVICE)
    method = fa.OFT(block_size=32, cayley="neumann")
    params = {
        path: fa.OFTParams(gaussian(*leaf.oft_R.shape, std=0.05))
        for path, leaf in fa.init(method, model).items()
    }
    forward, x = fa.bind(model, method), gaussian(7, 64, seed=1)

    def loss(params, x):
        return forward(params, x).square().sum()

    many, xs = fa.stack([params, params]), torch.stack([x, 2 * x])
    pairs = [
        (fa.value_and_grad(loss)(params, x), torch.func.grad_and_value(loss)(params, x)[::-1]),
        (
            fa.value_and_grad(loss, in_dims=(0, 0))(many, xs),
            vmap(torch.func.grad_and_value(loss))(many, xs)[::-1],
        ),
    ]
    for got, want in pairs:
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
            assert share(a, b.double()) <= 32 * EPS
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert forward(params, x).dtype == torch.bfloat16
    prepared = forward.prepare(params)
    assert share(forward(params, x), forward(prepared, x).double()) <= 16 * EPS
    # Which layers are left to do so: nothing but vmap looks on, and no block is dropped.
    for other, left in ((method, True), (replace(method, dropout=0.5), False)):
        leaves = ready(other, params, {}).values()
        assert all(isinstance(leaf, fa.OFTParams) == left for leaf in leaves)
    jvp(lambda p: all_prepared(ready(method, p, {})), (params,), (params,))


def all_prepared(leaves):
    assert not any(isinstance(leaf, fa.OFTParams) for leaf in leaves.values())
    return leaves


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no product of bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype):
    x, R = gaussian(40, 3 * 32).to(dtype), gaussian(3, 32, 32, seed=1)
    want = apart(x.double(), R.double())
    y = oft_gpu.rotate(x, R)
    assert y.dtype == dtype
    # The result's rounding is half an eps of each element; that of R's two parts, 2^-17.
    assert ((y - want).abs() <= torch.finfo(dtype).eps * (want.abs() + 0.05)).all()
    g = gaussian(40, 3 * 32, seed=2).to(dtype)
    slope = oft_gpu._outer(x, g, 32, 0)
    exact = torch.einsum("tri,trj->rij", *(t.double().unflatten(-1, (3, 32)) for t in (x, g)))
    assert share(slope, exact) <= 4 * EPS


@pytest.mark.skipif(INTERPRETED, reason="it launches nothing")
def test_a_profiler_sees_every_launch():
    from triton import knobs

    vectors, seen = gaussian(5, 6), []
    hook, want = seen.append, oft_gpu.build(vectors, None)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert torch.equal(oft_gpu.build(vectors, None), want)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert torch.equal(oft_gpu.build(vectors, None), want)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "wide", "rank"), [(70, 100, 3), (33, 64, 16), (5, 300, 40)])
def test_norms(rows: int, wide: int, rank: int, dtype: torch.dtype):
    W, A, B = gaussian(rows, wide), gaussian(rank, wide, seed=1), gaussian(rank, rows, seed=2).mT
    A, B = A.to(dtype), B.to(dtype)
    got = dora_gpu.row_norms(W, W.square().sum(1), A, B, 1.5)
    assert share(got, (W.double() + 1.5 * B.double() @ A.double()).norm(dim=1)) <= 4 * EPS
    W = -1.5 * (B.float() @ A.float())
    gone = dora_gpu.row_norms(W, W.square().sum(1), A, B, 1.5)
    # Squares are added: what rounding leaves of a row that the update cancels is their root.
    size = 1.5 * (B.double().abs() @ A.double().norm(dim=1))
    assert (gone <= 4 * EPS**0.5 * size).all()
