"""OFT's compiled loops: they are the torch that they stand in for, and touch nothing else."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fadapt as fa
from fadapt.cayley import plain, rotation
from fadapt.kernels import oft_cpu, oft_loops
from fadapt.kernels.oft_bodies import ROWS
from fadapt.kernels.oft_ops import turn
from fadapt.kernels.openmp import run, unpacked
from fadapt.kernels.small_products import across, product
from fadapt.testing import assert_pure

EPS = torch.finfo(torch.float32).eps
OWN = (1.0, -2.0, 2.0, -2.0, 2.0)
PEFT = (1.0, 2.0, 2.0, 2.0, 1.0)
FORMS = [None, OWN, PEFT, (1.0, -2.0), (1.0, -2.0, 2.0), (1.0, 2.0, 2.0, 1.0), (*OWN, -2.0, 2.0)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, digits: float = 16) -> bool:
    """Up to ``digits`` eps of the largest element: 16 for a few products, one after the other, of
    sums of at most some hundred terms, whose roundings add up as their square root."""
    return bool((got - want).abs().max() <= digits * EPS * want.abs().max())


def _product(numbers: Any) -> None:
    C, A, B, at, ldc, step, along, ldb, m, n, k, add = unpacked(numbers, 12)
    product(C + 4 * at, ldc, A, step, along, B, ldb, m, n, k, -1.5, add != 0)


def _across(numbers: Any) -> None:
    A, C, at, lda, ldc, m, n, add = unpacked(numbers, 8)
    across(A, lda, C + 4 * at, ldc, m, n, -1.5, add != 0)


SHAPES = [(1, 1), (8, 32), (9, 33), (17, 16), (16, 16), (32, 48), (3, 50), (4, 7)]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_product_and_nothing_beside_it(m: int, n: int, add: bool):
    for k in (0, 1, 5, 40):
        a, b, c = gaussian(m, k), gaussian(k, n + 2, seed=1), gaussian(m + 2, n + 3, seed=2)
        want = c.double()
        inside = want[1:-1, 1 : n + 1]
        inside.mul_(add).sub_(1.5 * a.double() @ b[:, :n].double())
        for left, steps in ((a, (k, 1)), (a.mT.contiguous(), (1, m))):
            out = c.clone()
            run(_product, 1, (out, left, b), n + 4, n + 3, *steps, n + 2, m, n, k, add)
            assert close(out[1:-1, 1 : n + 1], inside)
            out[1:-1, 1 : n + 1] = c[1:-1, 1 : n + 1]
            assert torch.equal(out, c)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_transpose_and_nothing_beside_it(m: int, n: int, add: bool):
    a, c = gaussian(n, m + 1), gaussian(m + 2, n + 3, seed=2)
    want = c.clone()
    want[1:-1, 1 : n + 1] = add * want[1:-1, 1 : n + 1] - 1.5 * a[:, :m].mT
    run(_across, 1, (a, c), n + 4, m + 1, n + 3, m, n, add)
    assert close(c, want, 1)


@pytest.mark.parametrize("size", [2, 5, 8, 16, 24, 32, 48, 100])
@pytest.mark.parametrize("coefficients", FORMS, ids=str)
def test_all_loops_are_the_torch_that_they_stand_for(coefficients: Any, size: int):
    k, r, t = 3, 4, ROWS + 3
    v = gaussian(k, r, size * (size - 1) // 2) / (8 * size**0.5)
    if coefficients is None:
        v[1, 2] *= 40  # beyond the polynomials
        v[0, 1] /= 10  # the shortest
    x, g = gaussian(k, t, r * size, seed=1), gaussian(k, t, r * size, seed=2)
    G = gaussian(k, r, size, size, seed=3)
    wide = [one.double().requires_grad_() for one in (x, v)]
    R = plain(wide[1], coefficients)
    y = turn(wide[0], R)
    wanted = torch.autograd.grad(y, wide, g.double(), retain_graph=True)

    got, kept = oft_loops.turned(x, v, coefficients)
    built = oft_loops.build(v, coefficients)
    digits = 32 if size > 48 else 16  # a solve rounds in each of its steps
    assert close(built, R, digits)
    assert close(got, y, digits)
    assert kept is None or torch.equal(kept, built)
    assert torch.equal(oft_loops.rotated(x, built), got)  # whichever way, the same bits
    for needs_x in (True, False):
        dx, dv = oft_loops.turned_back(x, v, kept, g, coefficients, needs_x)
        assert close(dv, wanted[1])
        assert dx is None if not needs_x else close(dx, wanted[0])
    (of_R,) = torch.autograd.grad(R, wide[1], G.double(), retain_graph=True)
    assert close(oft_loops.build_backward(v, kept, G, coefficients), of_R)
    back = turn(g.double(), R.mT)
    assert close(oft_loops.rotated(g, built.mT), back)
    dx, dR = oft_loops.rotated_back(x, built, g, True)
    assert close(dx, back)
    (of_R,) = torch.autograd.grad(y, R, g.double())
    assert close(dR, of_R)
    assert torch.equal(oft_loops.products(x, g, size, k), dR)
    none, same = oft_loops.rotated_back(x, built, g, False)
    assert none is None
    assert torch.equal(same, dR)


def test_a_block_that_all_share():
    x, g, v = gaussian(5, 24), gaussian(5, 24, seed=1), 0.1 * gaussian(1, 28)
    R = oft_loops.build(v, None).requires_grad_()
    y = turn(x.requires_grad_(), R)
    want = torch.autograd.grad(y, (x, R), g)
    assert close(oft_loops.rotated(x.detach(), R.detach()), y)
    got = oft_loops.rotated_back(x.detach(), R.detach(), g, True)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_no_bit_depends_on_neighbours_rows_or_threads(coefficients: Any):
    v, x = gaussian(2, 3, 120) / 40, gaussian(2, 9, 48, seed=1)
    v[1, 1] *= 30  # of the exact form, left to a solve
    y, _ = oft_loops.turned(x, v, coefficients)
    alone, _ = oft_loops.turned(x[1, :4, 16:32].clone(), v[1, 1:2].clone(), coefficients)
    assert torch.equal(y[1, :4, 16:32], alone)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(oft_loops.turned(x, v, coefficients)[0], y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_inputs_stay_as_they_are_and_may_lie_anyhow(coefficients: Any):
    v, x, g = gaussian(4, 28) / 20, gaussian(5, 32, seed=1), gaussian(5, 32, seed=2)
    y, R = assert_pure(lambda: oft_loops.turned(x, v, coefficients), [x, v, g])
    want = assert_pure(lambda: oft_loops.turned_back(x, v, R, g, coefficients, True), [x, v, g])
    across_x, across_v, across_g = (t.mT.contiguous().mT for t in (x, v, g))
    assert torch.equal(oft_loops.turned(across_x, across_v, coefficients)[0], y)
    got = oft_loops.turned_back(across_x, across_v, R, across_g, coefficients, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    built = oft_loops.build(v, coefficients)
    for one in (built, built.mT):
        want = assert_pure(lambda one=one: oft_loops.rotated_back(x, one, g, True), [x, built, g])
        got = oft_loops.rotated_back(across_x, one.clone(), across_g, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_where_they_are_taken():
    v = gaussian(4, 28)
    assert oft_cpu.loops(8, v) is oft_loops
    assert oft_cpu.loops(oft_cpu.MOST + 1, v) is None
    assert oft_cpu.loops(8, v, v.double()) is None
    assert oft_cpu.loops(8, v[:0]) is None


@pytest.mark.parametrize("cayley", ["exact", "neumann"])
def test_the_same_without_numba(cayley: str, monkeypatch: pytest.MonkeyPatch):
    layer = torch.nn.Linear(64, 5)
    method = fa.OFT(block_size=16, cayley=cayley)
    forward, x = fa.bind(layer, method), gaussian(3, 7, 64)
    many = fa.stack([{"": fa.OFTParams(gaussian(4, 120, seed=n) / 20)} for n in range(3)])
    step = fa.value_and_grad(lambda p, x: forward(p, x).square().sum(), in_dims=(0, 0))
    loss, grads = step(many, x)
    monkeypatch.setattr(oft_cpu, "_loops", lambda: None)
    other, wanted = step(many, x)
    assert close(loss, other)
    assert close(grads[""].oft_R, wanted[""].oft_R)


def test_without_numba_there_are_none():
    code = "from fadapt.kernels import oft_cpu; assert oft_cpu._loops() is None"
    for before in ("sys.modules['numba'] = None", "os.environ['NUMBA_DISABLE_JIT'] = '1'"):
        given = f"import os, sys; {before}; {code}"
        subprocess.run([sys.executable, "-W", "ignore", "-c", given], check=True)


def test_a_merge_compiles_nothing():
    code = """
import sys, torch, fadapt as fa
model, method = torch.nn.Linear(64, 8), fa.OFT(block_size=32)
fa.merge(model, {"": fa.OFTParams(0.01 * torch.ones(2, 496))}, method)
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("coefficients", [None, OWN], ids=["exact", "series"])
def test_numbers_that_are_not_at_their_address(coefficients: Any):
    v, x = gaussian(4, 28) / 20, gaussian(5, 32, seed=1)
    R = oft_loops.build(v, coefficients)
    outlived: list[Tensor] = []

    def leaking(t: Tensor) -> Tensor:
        outlived.append(-t)
        return t.sum()

    def views(t: Tensor) -> list[Tensor]:
        """-t, three times."""
        torch.func.grad(leaking)(t)
        stepped = torch.complex(torch.zeros_like(t), t).conj().imag
        return [torch._neg_view(t), outlived.pop(), stepped]

    for record in (False, True):
        with torch.set_grad_enabled(record):
            want = oft_cpu.turned(-x, -v, coefficients)
            for minus_x, minus_v in zip(views(x), views(v), strict=True):
                assert close(oft_cpu.turned(minus_x, minus_v, coefficients), want)
                assert close(rotation(minus_v, coefficients), R.mT)
            for minus_R in views(R):
                assert close(oft_cpu.rotate(x, minus_R), -oft_cpu.rotate(x, R))
    leaf = v.requires_grad_()
    zeros = [torch._efficientzerotensor(t.shape) for t in (x, v)]
    assert not oft_cpu.rotate(zeros[0], R).any()
    assert torch.equal(rotation(zeros[1], coefficients), torch.eye(8).expand(4, 8, 8))
    (slope,) = torch.autograd.grad(oft_cpu.turned(x, leaf, coefficients), leaf, zeros[0])
    assert not slope.any()


# Of shapes, which a trace has for numbers that could change.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("cayley", fa.oft.CAYLEY)
def test_a_trace_of_torch_has_all_of_it(cayley: str):
    method, layer = fa.OFT(block_size=8, cayley=cayley), torch.nn.Linear(32, 5)
    params, x = {"": fa.OFTParams(gaussian(4, 28) / 40)}, gaussian(3, 32)
    forward = fa.bind(layer, method)
    for given in (params, forward.prepare(params)):
        with torch.no_grad():  # else a Function, as which it is kept, runs in Python
            trace = torch.jit.trace(lambda x, p=given: forward(p, x), x, check_trace=False)
        assert "aten::empty" not in str(trace.graph)  # of which the result could be left there
        assert close(trace(2 - x), forward(given, 2 - x))


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("cayley", fa.oft.CAYLEY)
def test_an_input_of_another_width_is_refused(cayley: str, rows: int):
    method, base = fa.OFT(block_size=8, cayley=cayley), fa.base_of(torch.nn.Linear(32, 5))
    params = fa.OFTParams(gaussian(rows, 28) / 40)
    prepared = fa.OFTRotation(method.rotation(params))
    weight = base.dequantize()
    for given in (params, prepared):
        for call in (
            lambda p: method.apply(base, p, gaussian(3, 32)),
            lambda p: method.merge(weight, p),
            lambda p: method.unmerge(weight, p),
        ):
            with pytest.raises(RuntimeError, match="size"):
                call(given)
