"""OFT: law 7 under hypothesis, PEFT's own numbers, COFT, dropout, prepared rotations."""

import copy
import itertools
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_map

import fadapt as fa
import fadapt.cayley
import fadapt.oft
from fadapt.cayley import polynomial, rotation, skew
from fadapt.errors import AdapterError, ConfigError
from fadapt.kernels import oft_cpu
from fadapt.testing import assert_pure

EPS = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


def model_of(width: int = 12, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 6)).to(dtype)


def gaussian(shape: Any, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(method: fa.OFT, model: nn.Module, seed: int = 0, std: float = 0.1) -> Any:
    g = torch.Generator().manual_seed(seed)
    return tree_map(
        lambda t: (std * torch.randn(t.shape, generator=g)).to(t), fa.init(method, model)
    )


# Law 7


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 6, 12]),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    st.booleans(),
    st.integers(0, 100),
)
def test_law_7_exact_cayley_rotates(size: int, std: float, share: bool, seed: int):
    layer = nn.Linear(12, 7, dtype=torch.float64)
    method = fa.OFT(block_size=size, block_share=share)
    params = drawn(method, layer, seed, std)
    R = method.rotation(params[""])
    # A solve is backward stable: its error is a few eps times the condition number of I + Q, which
    # for a skew Q is at most 1 + |Q|.
    tolerance = 16 * 12 * EPS64 * (1 + float(torch.linalg.matrix_norm(skew(params[""][0])).max()))
    assert (R @ R.mT - torch.eye(size)).abs().max() <= tolerance
    assert (torch.linalg.det(R) - 1).abs().max() <= tolerance
    error = method.orthogonality_error(params)[""]
    assert 0 <= error <= 12 * tolerance
    # The neurons, rows of W, keep their lengths and the angles between them.
    W = layer.weight.detach()
    merged = method.merge(W, params[""])
    scale = W.norm(dim=-1).max() ** 2
    assert (merged @ merged.mT - W @ W.mT).abs().max() <= 12 * tolerance * scale
    assert std < 0.1 or (merged - W).abs().max() > 1e-3
    # Merging commutes with applying, and unmerging inverts it.
    x = gaussian((3, 12), seed + 1).double()
    y = fa.bind(layer, method)(params, x)
    assert (y - functional_call(layer, {"weight": merged}, x)).abs().max() <= 100 * tolerance
    assert (method.unmerge(merged, params[""]) - W).abs().max() <= 100 * tolerance


@pytest.mark.parametrize("cayley", ["neumann", "auto"])
def test_merge_by_rows_and_unmerge_without_orthogonality(cayley: str):
    layer = nn.Linear(12, 7, dtype=torch.float64)
    method = fa.OFT(block_size=4, cayley=cayley, terms=3)
    params = drawn(method, layer, std=0.3)
    W = layer.weight.detach()
    merged = method.merge(W, params[""])
    assert torch.equal(merged[2:5], method.merge(W[2:5], params[""], slice(2, 5)))
    # By an inverse of blocks whose condition is under 10.
    assert (method.unmerge(merged, params[""]) - W).abs().max() <= 1000 * EPS64
    prepared = method.prepare(params)[""]
    R = prepared.rotation
    off = torch.linalg.matrix_norm(R @ R.mT - torch.eye(4)).max()
    assert off > 1e-3 or cayley == "auto"
    assert method.orthogonality_error(params)[""] == off
    assert torch.equal(merged, method.merge(W, prepared))
    assert (method.unmerge(merged, prepared) - W).abs().max() <= 1000 * EPS64


def test_merge_computes_in_the_wider_dtype():
    layer, method = nn.Linear(12, 7), fa.OFT(block_size=4, dtype=torch.bfloat16)
    params = drawn(method, layer)
    merged = method.merge(layer.weight.detach(), params[""])
    assert merged.dtype == torch.float32
    wide = tree_map(lambda t: t.double(), params[""])
    want = method.merge(layer.weight.detach().double(), wide)
    assert (merged - want).abs().max() <= 12 * EPS  # sums of 4 products of order 1, and a solve


# The series


@given(st.integers(0, 12), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_polynomial_is_the_plain_sum(degree: int, seed: int):
    X = gaussian((2, 3, 3), seed, 0.5).double()
    coefficients = [float(c) for c in gaussian((degree + 1,), seed + 1)]
    want = sum(c * torch.linalg.matrix_power(X, k) for k, c in enumerate(coefficients))
    size = sum(abs(c) * torch.linalg.matrix_norm(X).max() ** k for k, c in enumerate(coefficients))
    assert (polynomial(X, coefficients) - want).abs().max() <= 100 * EPS64 * size


def test_every_term_of_our_series_counts_and_leads_to_the_exact_form():
    layer = nn.Linear(12, 7, dtype=torch.float64)
    params = drawn(fa.OFT(block_size=4), layer, std=0.15)
    exact = fa.OFT(block_size=4).rotation(params[""])
    Q = skew(params[""].oft_R)
    top = float(torch.linalg.eigvals(Q).abs().max())
    assert top < 0.9
    errors = []
    for terms in range(2, 12):
        method = fa.OFT(block_size=4, cayley="neumann", terms=terms)
        error = float(torch.linalg.matrix_norm(method.rotation(params[""]) - exact, 2).max())
        # What is left out of a geometric series in Q: 2 |Q|^terms / |1 + i t|, with |1 + i t| >= 1.
        assert error <= 2 * top**terms + 1e-14
        errors.append(error)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_a_last_term_counted_in_full_is_nearer_to_a_rotation_than_half_of_it():
    layer = nn.Linear(32, 4)
    params = drawn(fa.OFT(block_size=32), layer, std=0.02)
    ours, theirs = (
        fa.OFT(cayley="neumann", form=form).orthogonality_error(params)[""]
        for form in ("own", "peft")
    )
    assert ours < theirs / 3


def test_auto_takes_the_series_where_it_is_good_and_the_exact_form_elsewhere():
    layer = nn.Linear(12, 7)
    vectors = gaussian((3, 6))
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * torch.tensor([[0.05], [0.5], [1e12]])
    auto, series, exact = (
        fa.OFT(block_size=4, cayley=c, terms=5) for c in ("auto", "neumann", "exact")
    )

    def rotation(method: fa.OFT, v: Tensor) -> Tensor:
        return method.rotation(fa.OFTParams(v))

    R = rotation(auto, vectors)
    assert torch.equal(R[0], rotation(series, vectors)[0])
    assert torch.equal(R[1:], rotation(exact, vectors)[1:])
    assert torch.equal(rotation(auto, vectors[:1]), rotation(series, vectors[:1]))
    assert torch.equal(rotation(auto, vectors[1:]), rotation(exact, vectors[1:]))
    # What a transform or the compiler traces takes no branch, and gives the same.
    traced = vmap(lambda v: rotation(auto, v))(torch.stack([vectors, vectors / 7]))
    assert torch.equal(traced[0], R)
    slope = grad(lambda v: rotation(auto, v).square().sum())(vectors)
    assert slope.isfinite().all()
    assert layer.weight.grad is None


def test_the_rotation_does_not_lose_digits_under_autocast():
    method, params = fa.OFT(block_size=4), fa.OFTParams(gaussian((3, 6)))
    want = method.rotation(params)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.rotation(params), want)


@pytest.mark.parametrize(
    "coefficients",
    [None, (1.0, -2.0), (1.0, 2.0, 1.0), *[(1.0, *[-2.0, 2.0] * 3)[:n] for n in (4, 5, 6, 7)]],
    ids=str,
)
def test_every_derivative_by_loops_is_the_plain_one(coefficients: Any):
    vectors = gaussian((7, 6), std=0.3).double()

    def everything(f: Any, vectors: Tensor) -> Any:
        def run(v: Tensor) -> Tensor:
            return f(v, coefficients)

        def scalar(v: Tensor) -> Tensor:
            return (run(v) ** 3).sum()

        leaf = vectors.clone().requires_grad_()
        (first,) = torch.autograd.grad(scalar(leaf), leaf)
        (kept,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((kept**2).sum(), leaf)
        stack = torch.stack([vectors, vectors / 2])
        return (
            run(vectors),
            first,
            second,
            vmap(run)(stack),
            vmap(grad(scalar))(stack),
            torch.func.jvp(run, (vectors,), (vectors.flip(0),))[1],
            torch.autograd.grad(vmap(scalar)(stack.requires_grad_()).sum(), stack)[0],
        )

    plain = everything(fadapt.cayley.plain, vectors)
    for kind, eps in ((torch.float64, EPS64), (torch.float32, EPS)):
        found = everything(fadapt.cayley.rotation, vectors.to(kind))
        for got, want in zip(found, plain, strict=True):
            assert got.dtype == kind
            # Second derivatives of a cube: sums of a hundred terms of both signs.
            assert (got - want).abs().max() <= 100 * eps * want.abs().max()
    assert torch.autograd.gradcheck(
        lambda v: fadapt.cayley.rotation(v, coefficients),
        vectors.clone().requires_grad_(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("norm", [0.35, 0.6, 0.97, 3.0], ids=["4", "5", "6", "solve"])
@pytest.mark.parametrize("size", [6, 32, 100])
def test_the_exact_form_by_products_is_a_rotation_to_the_last_digit(size: int, norm: float):
    vectors = gaussian((5, size * (size - 1) // 2))
    largest = torch.linalg.matrix_norm(skew(vectors), 2)
    # The bound that chooses is at most b^(1/8) times too large for each pair of eigenvalues.
    vectors = vectors * norm / size**0.125 / largest[:, None]
    R = fadapt.cayley.rotation(vectors)
    want = fadapt.cayley.cayley(skew(vectors.double()))
    # Each element is a sum of b products with rounded factors, of rows of length about 1; a solve
    # has rounded in each of its b steps as well.
    digits = 4 if norm < 1 else 16
    assert (R - want).abs().max() <= digits * EPS
    assert (R.double() @ R.mT.double() - torch.eye(size)).abs().max() <= digits * EPS
    assert torch.equal(fadapt.cayley.rotation(0 * vectors), torch.eye(size).expand_as(R))


@pytest.mark.parametrize("options", [{}, {"cayley": "auto"}, {"coft": True, "eps": 0.1}], ids=str)
def test_a_merge_a_few_blocks_at_a_time_is_the_same(options: Any, monkeypatch: Any):
    layer, method = nn.Linear(20, 3), fa.OFT(block_size=4, **options)
    params = {"": fa.OFTParams(gaussian((5, 6), std=0.2))}
    want = fa.merge(layer, params, method)
    monkeypatch.setattr(fadapt.oft, "MERGED", 2 * 4**2)  # two blocks, and one is left
    got = fa.merge(layer, params, method)
    assert torch.equal(got["weight"], want["weight"])
    x = gaussian((7, 20), seed=1)
    y, forward = functional_call(layer, got, x), fa.bind(layer, method)
    # Sums of 20 products of order 1, in another order.
    assert (y - forward(params, x)).abs().max() <= 20 * EPS


def test_large_blocks_of_several_threads_come_to_an_end():
    code = """
import torch, fadapt as fa
from fadapt.cayley import cayley, skew
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64):
    v = 0.2 * torch.randn(3, 200 * 199 // 2, generator=g, dtype=dtype)
    Q, eye = skew(v), torch.eye(200, dtype=dtype)
    want = torch.stack([torch.linalg.solve(eye + q, eye - q, left=False) for q in Q])
    params = fa.OFTParams(v)
    for R in (cayley(Q), fa.OFT(block_size=200).rotation(params)):
        assert (R - want).abs().max() <= 200 * torch.finfo(dtype).eps
    method = fa.OFT(block_size=200, cayley="neumann")
    few, weight = fa.OFTParams(v / 40), torch.randn(4, 600, generator=g, dtype=dtype)
    back = method.unmerge(method.merge(weight, few), few)
    assert (back - weight).abs().max() <= 100 * torch.finfo(dtype).eps * weight.abs().max()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_a_row_its_rotation_and_every_derivative(shared: bool):
    x = gaussian((4, 3, 12)).double()
    R = gaussian((2, 1 if shared else 3, 4, 4), 1).double()
    several = torch.stack([R, R.flip(0)]), torch.stack([x, 2 * x])

    def plain(x: Tensor, R: Tensor) -> Tensor:
        parts = zip(x.chunk(R.shape[0]), R, strict=True)
        each = [
            torch.einsum("...ri,rij->...rj", a.unflatten(-1, (-1, 4)), b.expand(3, 4, 4))
            for a, b in parts
        ]
        return torch.cat(each).flatten(-2)

    def results(f: Any) -> list[Tensor]:
        def loss(x: Tensor, R: Tensor) -> Tensor:
            return f(x, R).square().sum()

        def slope(x: Tensor, R: Tensor) -> Tensor:
            return sum(t.square().sum() for t in grad(loss, (0, 1))(x, R))

        found = [
            f(x, R),
            grad(loss, (0, 1))(x, R),
            grad(slope, (0, 1))(x, R),
            torch.func.jvp(f, (x, R), (x.flip(0), R.flip(0))),
            vmap(f, (None, 0))(x, several[0]),
            vmap(f, (0, None), 1)(several[1], R),
            vmap(grad(loss, (0, 1)), (0, 0))(several[1], several[0]),
            vmap(grad(slope, 1), (None, 1))(x, several[0].movedim(0, 1)),
            torch.func.hessian(loss, 1)(x, R),
        ]
        return torch.utils._pytree.tree_leaves(found)

    for got, want in zip(results(oft_cpu.rotate), results(plain), strict=True):
        assert (got - want).abs().max() <= 100 * EPS64 * want.abs().max()
    assert torch.autograd.gradcheck(
        oft_cpu.rotate,
        (x.clone().requires_grad_(), R.clone().requires_grad_()),
        check_forward_ad=True,
        check_batched_grad=True,
    )
    low = oft_cpu.rotate(x.bfloat16(), R.float())
    assert low.dtype == torch.bfloat16
    exact = plain(x.bfloat16().double(), R.float().double())
    # Rounded once: half an eps of bfloat16, and float32's own rounding.
    assert ((low - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 16 * EPS).all()


# PEFT as the oracle


def peft_twin(model: nn.Module, names: tuple[str, ...] = ("default",), **config: Any) -> Any:
    options = {"oft_block_size": 4, "target_modules": ["0", "2"]} | config
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.OFTConfig(**options), adapter_name=names[0]
    )
    for name in names[1:]:
        wrapped.add_adapter(name, peft.OFTConfig(**options))
    return wrapped.eval()


def put(wrapped: Any, params: Any, name: str = "default") -> None:
    for path, leaf in params.items():
        layer = wrapped.base_model.model.get_submodule(path)
        layer.oft_R[name].weight.data.copy_(leaf.oft_R)


THEIRS = [
    pytest.param(
        {"use_cayley_neumann": False}, fa.OFT(block_size=4, cayley="exact"), 0.5, id="exact"
    ),
    *(
        pytest.param(
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms},
            fa.OFT(block_size=4, cayley="neumann", terms=terms, form="peft"),
            0.2,
            id=f"series-{terms}",
        )
        for terms in range(2, 8)
    ),
    pytest.param(
        {"use_cayley_neumann": False, "oft_block_size": 2, "block_share": True},
        fa.OFT(block_size=2, block_share=True),
        0.5,
        id="shared",
    ),
    pytest.param(
        {"use_cayley_neumann": False, "coft": True, "eps": 0.5},
        fa.OFT(block_size=4, coft=True, eps=0.5),
        0.5,
        id="coft",
    ),
    pytest.param(
        {"oft_block_size": 0, "r": 2},
        fa.OFT(blocks=2, cayley="neumann", form="peft"),
        0.1,
        id="blocks",
    ),
]


@pytest.mark.parametrize(("config", "method", "std"), THEIRS)
def test_peft_outputs_gradients_and_merged_weights(config: Any, method: fa.OFT, std: float):
    model = model_of()
    params = drawn(method, model, std=std)
    wrapped, x = peft_twin(model, **config), gaussian((5, 12))
    put(wrapped, params)
    forward = fa.bind(model, method)
    want = wrapped(x)
    # A dozen products and sums a layer, of numbers of order 1, in another order.
    assert (forward(params, x) - want).abs().max() <= 32 * EPS * want.abs().max()
    assert (want - model(x)).abs().max() > 1e-2

    if not method.coft:  # whose gradient PEFT takes past the projection that it has written
        wrapped.zero_grad()
        want.square().mean().backward()
        grads = grad(lambda p: forward(p, x).square().mean())(params)
        for path, leaf in grads.items():
            theirs = wrapped.base_model.model.get_submodule(path).oft_R["default"].weight.grad
            assert (leaf.oft_R - theirs).abs().max() <= 128 * EPS * theirs.abs().max()

    merged = wrapped.merge_and_unload()
    for path, leaf in params.items():
        base = fa.base_of(model.get_submodule(path))
        ours = method.merge(base.dequantize(), leaf)
        assert (ours - merged.get_submodule(path).weight).abs().max() <= 32 * EPS


def test_pefts_series_rotates_the_other_way_and_ours_does_not():
    params = fa.OFTParams(gaussian((3, 6), std=0.05))
    exact = fa.OFT(block_size=4).rotation(params)
    ours = fa.OFT(block_size=4, cayley="neumann").rotation(params)
    theirs = fa.OFT(block_size=4, cayley="neumann", form="peft").rotation(params)
    moved = (exact - torch.eye(4)).norm()
    assert (ours - exact).norm() < 1e-3 * moved
    assert (theirs - exact).norm() > 1.5 * moved
    assert (theirs.mT - exact).norm() < 1e-2 * moved


def test_several_of_pefts_are_applied_in_our_order_and_merged_by_peft_in_the_other():
    model, method = model_of(), fa.OFT(block_size=4, cayley="neumann", form="peft")
    adapters, x = [drawn(method, model, seed, 0.2) for seed in (1, 2)], gaussian((5, 12))
    wrapped = peft_twin(model, ("a", "b"))
    for name, params in zip("ab", adapters, strict=True):
        put(wrapped, params, name)
    wrapped.base_model.set_adapter(["a", "b"])
    # PEFT rotates x by the first and then by the second, which is W R_2^T R_1^T: what comes last
    # in its forward is next to W.
    forward = fa.bind(model, [method, method])
    want = wrapped(x)
    assert (forward(adapters[::-1], x) - want).abs().max() <= 32 * EPS * want.abs().max()
    state = fa.merge(model, adapters[::-1], method)
    ours = functional_call(model, state, (x,))
    assert (ours - want).abs().max() <= 64 * EPS * want.abs().max()
    theirs = wrapped.merge_and_unload()(x)
    assert (theirs - want).abs().max() > 0.01 * want.abs().max()
    assert (theirs - forward(adapters, x)).abs().max() <= 64 * EPS * want.abs().max()


# COFT


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-4, 2.0), st.floats(1e-4, 2.0), st.integers(0, 50))
def test_coft_is_a_pure_projection(eps: float, std: float, seed: int):
    model, method = model_of(), fa.OFT(block_size=4, coft=True, eps=eps)
    params = drawn(method, model, seed, std)
    forward, x = fa.bind(model, method), gaussian((5, 12))
    y = assert_pure(lambda: forward(params, x), params, model, x)
    inside = method.project(params)
    for path, leaf in inside.items():
        norms = torch.linalg.matrix_norm(skew(leaf.oft_R))
        rows = leaf.oft_R.shape[0]
        assert (norms <= eps / rows**0.5 * (1 + 1e-5)).all()
        # A block that was inside is left as it was, and one outside keeps its direction.
        was = torch.linalg.matrix_norm(skew(params[path].oft_R))
        kept = was <= eps / rows**0.5
        assert torch.equal(leaf.oft_R[kept], params[path].oft_R[kept])
        cosine = torch.cosine_similarity(leaf.oft_R, params[path].oft_R, dim=-1)
        assert (cosine - 1).abs().max() <= 8 * EPS
    again = method.project(inside)
    for path, leaf in inside.items():
        assert torch.equal(leaf.oft_R, again[path].oft_R)
    assert torch.equal(y, forward(inside, x))


def test_coft_has_a_gradient_at_zero_and_on_the_border():
    model, method = model_of(), fa.OFT(block_size=4, coft=True, eps=0.1)
    forward, x = fa.bind(model, method), gaussian((5, 12))
    free = fa.bind(model, fa.OFT(block_size=4))

    def slopes(f: Any, p: Any) -> Any:
        return grad(lambda p: f(p, x).square().sum())(p)

    fresh = fa.init(method, model)
    border = method.project(drawn(method, model))
    for params in (fresh, border):
        ours, theirs = slopes(forward, params), slopes(free, params)
        for path in params:
            assert theirs[path].oft_R.abs().max() > 0
            assert torch.equal(ours[path].oft_R, theirs[path].oft_R)


# Dropout


def test_dropout_replaces_whole_blocks_by_the_identity():
    layer, method = nn.Linear(12, 7), fa.OFT(block_size=4, dropout=0.5)
    params, x = drawn(method, layer, std=0.5), gaussian((5, 12))
    forward = fa.bind(layer, method)
    keep = torch.tensor([True, False, True])
    vectors = params[""].oft_R * keep[:, None]  # a zero block rotates nothing
    want = forward({"": fa.OFTParams(vectors)}, x)
    assert torch.equal(forward(params, x, dropout={"": keep}), want)
    assert (want - forward(params, x)).abs().max() > 1e-2
    prepared = forward.prepare(params)
    assert torch.equal(forward(prepared, x, dropout={"": keep}), want)


@pytest.mark.parametrize("share", [False, True])
def test_dropout_by_seed_acts_repeats_and_differs_from_adapter_to_adapter(share: bool):
    layer, method = nn.Linear(64, 7), fa.OFT(block_size=2, dropout=0.25, block_share=share)
    params, x = drawn(method, layer, std=0.5), gaussian((64,))
    forward = fa.bind(layer, method)
    seeds = fa.dropout_seeds(torch.Generator().manual_seed(0), 8)
    ys = vmap(lambda s: forward(params, x, dropout=s))(seeds)
    for y, seed in zip(ys, seeds, strict=True):
        # One product of 8 rows against 8 of one: sums of 64 in another order.
        assert (y - forward(params, x, dropout=seed)).abs().max() <= 64 * EPS
    assert len({tuple(y.tolist()) for y in ys}) == 8
    assert (ys - forward(params, x)).abs().max() > 1e-3
    drawn_from = forward(params, x, dropout=torch.Generator().manual_seed(0))
    assert torch.equal(drawn_from, forward(params, x, dropout=seeds[0]))
    # How many blocks: the first of two inputs of each block, seen through an identity weight.
    eye = nn.Linear(64, 64, bias=False)
    eye.weight.data = torch.eye(64)
    many = fa.dropout_seeds(torch.Generator().manual_seed(1), 64)
    rotated = vmap(lambda s: fa.bind(eye, method)(params, torch.ones(64), dropout=s))(many)
    dropped = (rotated.unflatten(-1, (32, 2)) == 1).all(-1).float().mean()
    # 2048 draws of probability 1/4: a standard deviation of 0.0096.
    assert abs(float(dropped) - 0.25) < 0.04


# Prepared rotations


def test_a_prepared_rotation_is_a_leaf_across_micro_batches():
    model, method = model_of(dtype=torch.float64), fa.OFT(block_size=4)
    params, forward = drawn(method, model), fa.bind(model, method)
    xs = gaussian((3, 5, 12)).double()

    def loss(p: Any, x: Tensor) -> Tensor:
        return forward(p, x).square().sum()

    whole = grad(lambda p: sum(loss(p, x) for x in xs))(params)
    R, back = vjp(method.prepare, params)
    assert all(isinstance(leaf, fa.OFTRotation) for leaf in R.values())
    assert torch.equal(forward(R, xs[0]), forward(params, xs[0]))
    total = tree_map(torch.zeros_like, R)
    for x in xs:
        total = tree_map(torch.add, total, grad(loss)(R, x))
    (parts,) = back(total)
    for path, leaf in whole.items():
        # Three sums of 5 x 8 products each in another order.
        assert (parts[path].oft_R - leaf.oft_R).abs().max() <= 100 * EPS64 * leaf.oft_R.abs().max()


def test_prepared_stacks_and_layers_of_several_widths():
    model, method = model_of(), fa.OFT(blocks=2, cayley="neumann")
    adapters = [drawn(method, model, seed) for seed in range(3)]
    many, x = fa.stack(adapters), gaussian((5, 12))
    forward = fa.bind(model, method)
    ys = vmap(forward, (0, None))(vmap(method.prepare)(many), x)
    direct = vmap(forward, (0, None))(method.prepare(many), x)
    for k, params in enumerate(adapters):
        want = forward(params, x)
        for y in (ys[k], direct[k]):
            assert (y - want).abs().max() <= 16 * EPS * want.abs().max()


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 4, "blocks": 3}, "same thing twice"),
        ({"block_size": 1}, "block_size must be an integer of at least 2"),
        ({"blocks": 0}, "blocks must be"),
        ({"terms": 1}, "terms must be"),
        ({"cayley": "exp"}, "cayley must be one of exact, neumann, auto"),
        ({"form": "hf"}, "form must be one of"),
        ({"form": "peft", "cayley": "auto"}, "the other way"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"dtype": torch.int8}, "floating-point"),
    ],
)
def test_options_out_of_range(options: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        fa.OFT(**options)


def test_a_block_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ConfigError, match=r"12 inputs.*\[2, 3, 4, 6, 12\]"):
        fa.init(fa.OFT(block_size=5), nn.Linear(12, 3))
    with pytest.raises(ConfigError, match="blocks=5"):
        fa.init(fa.OFT(blocks=5), nn.Linear(12, 3))


def test_parameters_that_do_not_fit():
    layer, method = nn.Linear(12, 3), fa.OFT(block_size=4)
    forward, x = fa.bind(layer, method), torch.ones(2, 12)
    for leaf, words in (
        (fa.OFTParams(torch.zeros(2, 6)), r"r = 12 / b, got \[2, 6\]"),
        (fa.OFTParams(torch.zeros(3, 5)), r"got \[3, 5\]"),
        (fa.OFTParams(torch.zeros(2, 3, 6)), "A stack goes through"),
        (fa.OFTParams(torch.zeros(3, 6, dtype=torch.long)), "must be floating"),
        (fa.OFTRotation(torch.zeros(3, 4, 3)), r"rotation \[r, b, b\]"),
        (fa.LoRAParams(torch.zeros(2, 12), torch.zeros(3, 2)), "expected OFTParams"),
    ):
        with pytest.raises(AdapterError, match=words):
            forward({"": leaf}, x)
    shared = fa.bind(layer, fa.OFT(block_size=4, block_share=True))
    with pytest.raises(AdapterError, match=r"r = 1 \(block_share\)"):
        shared({"": fa.OFTParams(torch.zeros(3, 6))}, x)
    with pytest.raises(AdapterError, match="a number could scale"):
        fa.scale_by({"": fa.OFTParams(torch.zeros(3, 6))}, 2.0)


def test_a_layer_may_have_another_block_size_than_the_method_says():
    # As PEFT's checkpoints have, which adjusts a size that does not divide.
    layer = nn.Linear(12, 3)
    params = {"": fa.OFTParams(gaussian((2, 15)))}
    y = fa.bind(layer, fa.OFT(block_size=32))(params, torch.ones(12))
    assert torch.equal(y, fa.bind(layer, fa.OFT(block_size=6))(params, torch.ones(12)))


# Of linearize itself, about the constants of what it traced.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("cayley", ["exact", "neumann", "auto"])
def test_forward_mode_twice(cayley: str):
    layer = nn.Linear(8, 3).double()
    forward = fa.bind(layer, fa.OFT(block_size=4, cayley=cayley))
    g = torch.Generator().manual_seed(0)
    v, tv = (0.2 * torch.randn(2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    x, tx = (torch.randn(5, 8, generator=g, dtype=torch.float64) for _ in range(2))

    def f(v: Tensor, x: Tensor) -> Tensor:
        return forward({"": fa.OFTParams(v)}, x)

    def once(v: Tensor, x: Tensor) -> Tensor:
        return jvp(f, (v, x), (tv, tx))[1]

    h = 1e-4
    want = (f(v + h * tv, x + h * tx) - 2 * f(v, x) + f(v - h * tv, x - h * tx)) / h**2
    # A second difference: rounding over h^2, and h^2 of the fourth derivative.
    torch.testing.assert_close(jvp(once, (v, x), (tv, tx))[1], want, rtol=0, atol=1e-6)
    each = vmap(lambda v: jvp(lambda v: once(v, x), (v,), (tv,))[1])(torch.stack([v, -v]))
    torch.testing.assert_close(each[0], jvp(lambda v: once(v, x), (v,), (tv,))[1])
    _, tangent = linearize(f, v, x)
    torch.testing.assert_close(tangent(tv, tx), once(v, x))


@pytest.mark.parametrize("size", [5, 32])
def test_no_bit_of_a_rotation_depends_on_the_blocks_beside_it(size: int):
    # A tie of an activation's rounding goes by the last bit: a stack must be its adapters.
    scales = torch.tensor([0.01, 2.0, 0.05, 0.1, 0.01, 0.2, 0.4, 0.05])[:, None]
    vectors = scales * gaussian((8, size * (size - 1) // 2))
    together = rotation(vectors)
    alone = torch.cat([rotation(v[None]) for v in vectors])
    assert torch.equal(together, alone)
    ahead, _ = jvp(rotation, (vectors,), (vectors,))
    assert torch.equal(ahead, together)
