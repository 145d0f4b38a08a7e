"""OFT on a CPU: R from its vectors and the way back, a few blocks at a time in buffers that stay in
the cache.

The plain torch that they must equal is that of ``cayley.py``.

The exact form is ``R = I + 2 (Q^2 - Q) (I + S)^-1`` with the symmetric ``S = -Q^2``. A product of
32 x 32 costs a 25th of a solve, and where the eigenvalues of S, none of which is negative, lie
below a bound, the inverse is a polynomial in S, up to less than float32's rounding: 4 products in
all below 0.14, 5 below 0.4, 6 below 1. This R is nearer to a rotation than a solve's. What is
larger is solved.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fadapt.cayley import cayley, size_of
from fadapt.kernels.oft_ops import Coefficients

# Of the polynomials: up to which eigenvalue of S, their degree, and the powers of S that they take.
INVERSES = ((0.14, 4, 2), (0.4, 6, 2), (1.0, 9, 3))
CHUNK_BYTES = 2**18  # of R, at a time (measured: 32 to 128 blocks of 32 x 32 are alike)


class _Layout(NamedTuple):
    """Where a vector's elements lie in its flat block."""

    source: Tensor  # of each element of Q, which of the vector
    sign: Tensor  # 1 above the diagonal, -1 below
    upper: Tensor  # of each element of the vector, where above the diagonal
    lower: Tensor  # and where below


def build(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """R ``[..., b, b]`` of ``vectors [..., b (b - 1) / 2]``."""
    size = size_of(vectors.shape[-1])
    R = vectors.new_empty(*vectors.shape[:-1], size, size)
    flat, rows = R.view(-1, size, size), vectors.reshape(-1, vectors.shape[-1])
    for chunk, spare in _chunks(flat, 6):
        build_into(rows[chunk], coefficients, spare, flat[chunk])
    return R


def build_into(
    rows: Tensor, coefficients: Coefficients, spare: Sequence[Tensor], out: Tensor
) -> None:
    """R of ``rows [n, m]`` into ``out [n, b, b]``, with 6 buffers as large."""
    Q, *others = spare
    skew_into(rows, Q)
    if coefficients is None:
        _exact(Q, others, out)
    else:
        _series(Q, others, coefficients, out)


def build_backward(
    vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients
) -> Tensor:
    """The gradient with respect to ``vectors``, from that with respect to R; R itself is read for
    the exact form, whose derivative is ``-(R + I) dQ (R + I) / 2``."""
    size = g.shape[-1]
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    flat, rows = out.view(-1, out.shape[-1]), vectors.reshape(-1, out.shape[-1])
    G = g.reshape(-1, size, size)
    built = None if R is None else R.reshape(G.shape)
    for chunk, (Q, E, *spare) in _chunks(G, 5 + len(coefficients or ()) // 2):
        if coefficients is None:
            assert built is not None
            half = _plus(Q.copy_(built[chunk]), 1.0).mT
            E.baddbmm_(torch.bmm(half, G[chunk], out=spare[0]), half, beta=0, alpha=-0.5)
        else:
            _series_back(skew_into(rows[chunk], Q), G[chunk], spare, coefficients, E)
        fold_into(E, flat[chunk], Q)
    return out


def skew_into(rows: Tensor, out: Tensor) -> Tensor:
    """Q ``[n, b, b]`` of its vectors ``[n, m]``."""
    layout = _layout(out.shape[-1], out.dtype)
    flat = torch.index_select(rows, 1, layout.source, out=out.view(len(out), -1))
    flat.mul_(layout.sign)
    return out


def fold_into(E: Tensor, out: Tensor, spare: Tensor) -> None:
    """The adjoint of :func:`skew_into`; ``spare`` is as large as E, and is written to."""
    layout = _layout(E.shape[-1], E.dtype)
    upper = torch.index_select(E.flatten(1), 1, layout.upper, out=out)
    lower = spare.view(-1)[: upper.numel()].view(upper.shape)
    upper.sub_(torch.index_select(E.flatten(1), 1, layout.lower, out=lower))


def _exact(Q: Tensor, spare: Sequence[Tensor], out: Tensor) -> None:
    if Q.dtype != torch.float32:
        out.copy_(cayley(Q))
        return
    P, P2, *free = spare
    torch.bmm(Q, Q, out=P)
    torch.bmm(P, P, out=P2)
    # S's eigenvalues come in pairs: the largest is below (|S^2|_F^2 / 2)^(1/4).
    squares = torch.linalg.vector_norm(P2.flatten(1), dim=1)
    kinds = torch.bucketize(squares, _limits())  # NaN is beyond the last
    kind = int(kinds[0])
    if not bool((kinds != kind).any()):
        _exact_of(kind, Q, P, P2, free, out)
        return
    # Each by itself, so that no bit of a block depends on those beside it.
    for one in kinds.unique().tolist():
        (some,) = torch.where(kinds == one)
        part = [t[: len(some)] for t in free]
        R = torch.empty_like(part[0])
        _exact_of(one, Q[some], P[some], P2[some], part, R)
        out[some] = R


def _exact_of(
    kind: int, Q: Tensor, P: Tensor, P2: Tensor, free: Sequence[Tensor], out: Tensor
) -> None:
    """R of Q, by the polynomial of that kind; P is written to."""
    if kind == len(INVERSES):
        out.copy_(cayley(Q))
        return
    most, degree, step = INVERSES[kind]
    powers = (P, P2) if step == 2 else (P, P2, torch.bmm(P2, P, out=free[2]))
    inverse = _evaluate(powers, _inverse(degree, most), free)
    _plus(torch.bmm(P.sub_(Q), inverse, out=out), 1.0)


@lru_cache
def _limits() -> Tensor:
    return torch.tensor([math.sqrt(2) * most**2 for most, *_ in INVERSES], device="cpu")


@lru_cache
def _inverse(degree: int, most: float) -> tuple[float, ...]:
    """The coefficients, in P = -S, of a polynomial p near ``2 / (1 + s)`` for s in [0, most].

    Of all p of that degree, ``1 - (1 + s) p(s) / 2`` is smallest as Chebyshev's polynomial T of
    ``degree + 1`` in ``2 s / most - 1``, divided by its value at -1: here at most 8e-8, of which R
    has ``2 (s / (1 + s))^(1/2)``.
    """
    before, T = [1.0], [-1.0, 2 / most]
    for _ in range(degree):  # T_(n+1) = 2 x T_n - T_(n-1)
        after = [-2 * a for a in T] + [0.0]
        for k, a in enumerate(T):
            after[k + 1] += 4 / most * a
        for k, a in enumerate(before):
            after[k] -= a
        before, T = T, after
    at = sum(a * (-1) ** k for k, a in enumerate(T))
    rest, quotient = 0.0, []
    for k in range(degree + 1, 0, -1):  # (1 - T / at) / (1 + s)
        rest = -T[k] / at - rest
        quotient.append(2 * rest * (-1) ** (k - 1))
    return tuple(reversed(quotient))


def _evaluate(
    powers: Sequence[Tensor], coefficients: Sequence[float], free: Sequence[Tensor]
) -> Tensor:
    """``sum_k c_k P^k`` of ``powers`` P, P^2, ..., P^m and n m + 1 coefficients, in two buffers:
    Horner's scheme in the last power."""
    step, last = len(powers), powers[-1]
    total, scale = None, 1.0
    # c_0 + X_0 + (X_1 + ...) P^m, with X_j's own P^m in place of c_0 in X_(j+1).
    for n, start in enumerate(range(len(coefficients) - 1 - step, -1, -step)):
        c = coefficients[start + 1 : start + 1 + step]
        X = torch.add(powers[0], powers[1], alpha=c[1] / c[0], out=free[n % 2])
        for factor, power in zip(c[2:], powers[2:], strict=True):
            X.add_(power, alpha=factor / c[0])
        total = X if total is None else X.baddbmm_(total, last, beta=c[0], alpha=scale)
        scale = c[0] if n == 0 else 1.0
    assert total is not None
    return _plus(total if scale == 1 else total.mul_(scale), coefficients[0])


def _series(
    Q: Tensor, spare: Sequence[Tensor], coefficients: tuple[float, ...], out: Tensor
) -> None:
    """``sum_k c_k Q^k``, by Horner in P = Q^2: ``c_0 + X_0 + (X_1 + (X_2 + ...) P) P`` of
    ``X_j = c_(2j+1) Q + c_(2j+2) P``."""
    P, *sums = spare
    top = (len(coefficients) - 2) // 2
    odd, even = coefficients[1::2], coefficients[2::2]
    if even:
        torch.bmm(Q, Q, out=P)
    A, scale = Q, odd[-1]
    for j in reversed(range(top + 1)):
        X = sums[j % 2] if j else out
        if j == top and len(even) == len(odd):
            A, scale = torch.add(P, Q, alpha=odd[j] / even[j], out=X), even[j]
        elif j < top:
            torch.add(P, Q, alpha=odd[j] / even[j], out=X)
            A, scale = X.baddbmm_(A, P, beta=even[j], alpha=scale), 1.0
    if A is not out or scale != 1:
        torch.mul(A, scale, out=out)
    _plus(out, coefficients[0])


def _horner(
    Q: Tensor, P: Tensor, coefficients: tuple[float, ...], out: Sequence[Tensor | None]
) -> None:
    """By Horner in P = Q^2: ``A_j = A_(j+1) P + c_2j + c_(2j+1) Q``, into ``out[j]`` unless it is
    None; A_0 is the sum. Of an even degree, the last A is a number, and left out."""
    higher = None
    for j in reversed(range(len(out))):
        A = out[j]
        if A is None:
            return
        _plus(torch.mul(Q, coefficients[2 * j + 1], out=A), coefficients[2 * j])
        if higher is not None:
            A.baddbmm_(higher, P)
        elif 2 * j + 3 == len(coefficients):
            A.add_(P, alpha=coefficients[-1])
        higher = A


def _series_back(
    Q: Tensor, g: Tensor, spare: Sequence[Tensor], coefficients: tuple[float, ...], E: Tensor
) -> None:
    """The gradient of ``sum_k c_k Q^k`` with respect to a skew-symmetric Q, into E: but for a
    symmetric part, which Q's own symmetry has no use for.

    Back through :func:`_horner`. P is symmetric; its gradient G reaches Q as ``-(G Q + Q G)``, and
    that folds to what ``-(G + G^T) Q`` does: one product for two. In all 4 products for five terms,
    where autograd takes 6.
    """
    P, of_square, *free = spare
    torch.mul(g, coefficients[1], out=E)
    if len(coefficients) == 2:
        return
    count = len(coefficients) // 2
    factors = free[2 : count + 1]
    _horner(Q, torch.bmm(Q, Q, out=P), coefficients, [None, *factors])
    of_square.zero_()
    moved = g
    for j, factor in enumerate(factors, 1):
        of_square.baddbmm_(factor.mT, moved)
        moved = torch.bmm(moved, P, out=free[j % 2])
        E.add_(moved, alpha=coefficients[2 * j + 1])
    if len(coefficients) % 2:
        of_square.add_(moved, alpha=coefficients[-1])
    E.baddbmm_(torch.add(of_square, of_square.mT, out=P), Q, alpha=-1)


def _plus(blocks: Tensor, number: float) -> Tensor:
    """``blocks + number I``, in place."""
    blocks.diagonal(dim1=-2, dim2=-1).add_(number)
    return blocks


@lru_cache(maxsize=8)
def _layout(size: int, dtype: torch.dtype) -> _Layout:
    rows, cols = torch.triu_indices(size, size, 1, device="cpu")
    upper, lower = rows * size + cols, cols * size + rows
    source = torch.zeros(size * size, dtype=torch.int64, device="cpu")
    sign = torch.zeros(size * size, dtype=dtype, device="cpu")
    source[upper] = source[lower] = torch.arange(len(rows), device="cpu")
    sign[upper], sign[lower] = 1, -1
    return _Layout(source, sign, upper, lower)


def _chunks(blocks: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of ``blocks [n, b, b]``, and so many buffers of each one's shape."""
    count, size, _ = blocks.shape
    step = max(1, min(count, CHUNK_BYTES // (size * size * blocks.element_size())))
    spare = blocks.new_empty(buffers, step, size, size)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), list(spare[:, : stop - start].unbind())
