"""OFT on a CPU as compiled loops, a block of an adapter at a time in a core's own cache: R from its
vectors, ``x R``, and their gradients.

The torch that they must equal is that of ``cayley.py`` and ``oft_ops.py``. All tensors are float32.
x and g have rows of ``r b`` numbers, as many for each of the k adapters; vectors are ``[k, r, m]``,
and R is ``[k, r, b, b]``.

The exact form is ``R = I + 2 (Q^2 - Q) (I + S)^-1`` with the symmetric ``S = -Q^2``. A product of
32 x 32 costs a 25th of a solve, and where the eigenvalues of S, none of which is negative, lie
below a bound, the inverse is a polynomial in S, up to less than float32's rounding: 4 products in
all below 0.14, 5 below 0.4, 6 below 1. This R is nearer to a rotation than a solve's. What is
larger is solved.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fadapt.cayley import cayley, size_of, skew
from fadapt.kernels import oft_bodies as bodies
from fadapt.kernels.oft_ops import Coefficients, series_of
from fadapt.kernels.openmp import run

# Of the polynomials: up to which eigenvalue of S, their degree, and the powers of S that they take.
INVERSES = ((0.14, 4, 2), (0.4, 6, 2), (1.0, 9, 3))


def build(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    """R of its vectors."""
    R: Tensor = _turned(None, vectors, coefficients)[1]
    return R


def build_backward(
    vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients
) -> Tensor:
    """The gradient with respect to the vectors, from that with respect to R, which is read for the
    exact form."""
    vectors, g = vectors.contiguous(), g.contiguous()
    dv, b = torch.empty_like(vectors), g.shape[-1]
    count = vectors.shape[:-1].numel()
    threads = _threads(count)
    if coefficients is None:
        assert R is not None
        scratch = g.new_empty(threads, 3 * b * b)
        run(bodies.build_back_exact, threads, (R.contiguous(), g, dv, scratch), count, b)
    else:
        table = _table(coefficients)
        each = (6 + len(coefficients) // 2) * b * b
        scratch = g.new_empty(threads, each)
        numbers = count, b, len(coefficients), each
        run(bodies.build_back_series, threads, (vectors, g, dv, table, scratch), *numbers)
    return dv


def turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor | None]:
    """``x R`` of R's vectors; and R, of the exact form."""
    y, R = _turned(x.contiguous(), vectors, coefficients)
    return y, R if coefficients is None else None


def turned_back(
    x: Tensor,
    vectors: Tensor,
    R: Tensor | None,
    g: Tensor,
    coefficients: Coefficients,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of :func:`turned` with respect to x, if it needs one, and to the vectors.

    Of the exact form, ``dR = -(R + I) dQ (R + I) / 2``, so that Q's gradient is
    ``-(x + y)^T (g + dx) / 2`` of y = x R and dx = g R^T: a product with rows for two of blocks.

    Of a series, ``R = I + 2 sum_(k < n) M^k + last M^n`` of ``M = sign Q``, with
    ``W_0 = last / 2 g`` and ``W_m = g + W_(m - 1) M^T``: that of x is ``2 W_n - g``, and that of M
    ``2 sum_i (x M^i)^T W_(n - 1 - i)``, one product of all rows.
    """
    form = series_of(coefficients)
    assert form is not None
    sign, last, degree = form
    x, g, vectors = x.contiguous(), g.contiguous(), vectors.contiguous()
    b = size_of(vectors.shape[-1])
    k, r, t = _counts(x, vectors.shape[:-1], b)
    dx = torch.empty_like(x) if needs_x else None
    dv = torch.empty_like(vectors)
    threads = _threads(k * r)
    each = 2 * b * b + (2 * degree or 3) * t * b
    scratch = x.new_empty(threads, each)
    numbers = k, r, t, b, degree, int(sign), int(last), each
    if coefficients is None:
        assert R is not None
        tensors = x, g, R.contiguous(), dx, dv, scratch
        run(bodies.back_exact, threads, tensors, *numbers)
    else:
        run(bodies.back_series, threads, (x, g, vectors, dx, dv, scratch), *numbers)
    return dx, dv


def rotated(x: Tensor, R: Tensor) -> Tensor:
    """``x R``; R may lie transposed."""
    x = x.contiguous()
    y = torch.empty_like(x)
    across = not R.is_contiguous() and R.mT.is_contiguous()
    R, b = R if across else R.contiguous(), R.shape[-1]
    k, r, t = _counts(x, R.shape[:-2], b)
    threads = _threads(k * r * -(-t // bodies.ROWS))
    scratch = x.new_empty(threads, b * b) if across else None
    run(bodies.rotate, threads, (x, y, R, scratch), k, r, t, b)
    return y


def products(x: Tensor, g: Tensor, size: int, k: int) -> Tensor:
    """``x^T g`` block by block: ``[in / b, b, b]``, or of k adapters ``[k, in / b, b, b]``."""
    lead = (k, x.shape[-1] // size) if k else (x.shape[-1] // size,)
    return _products(x, g, None, lead, size)[1]


def rotated_back(x: Tensor, R: Tensor, g: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of ``x R``: ``g R^T``, if x needs one, and :func:`products`."""
    lead = (*R.shape[:-3], x.shape[-1] // R.shape[-1])
    dx, dR = _products(x, g, R if needs_x else None, lead, R.shape[-1])
    return dx, dR if lead == R.shape[:-2] else dR.sum(-3, keepdim=True)


def _products(
    x: Tensor, g: Tensor, R: Tensor | None, lead: tuple[int, ...], b: int
) -> tuple[Any, Tensor]:
    x, g = x.contiguous(), g.contiguous()
    R = None if R is None else R.contiguous()
    shared = R is not None and R.shape[-3] < lead[-1]
    dx, out = None if R is None else torch.empty_like(g), x.new_empty(*lead, b, b)
    k, r, t = _counts(x, lead, b)
    threads, each = _threads(k * r), 2 * bodies.ROWS * b + (0 if R is None else b * b)
    tensors = x, g, R, dx, out, x.new_empty(threads, each)
    run(bodies.outer, threads, tensors, k, r, t, b, int(shared), each)
    return dx, out


def _turned(x: Tensor | None, vectors: Tensor, coefficients: Coefficients) -> tuple[Any, Any]:
    vectors, table = vectors.contiguous(), _table(coefficients)
    b = size_of(vectors.shape[-1])
    k, r, t = _counts(x, vectors.shape[:-1], b)
    y = None if x is None else torch.empty_like(x)
    R: Any = None
    if x is None or coefficients is None:
        R = vectors.new_empty(*vectors.shape[:-1], b, b)
    left = vectors.new_empty(vectors.shape[:-1])
    threads = _threads(k * r)
    scratch = vectors.new_empty(threads, 7 * b * b)
    kinds = len(table) if coefficients is None else 0
    tensors = x, y, vectors, R, left, table, scratch
    run(bodies.turn, threads, tensors, k, r, t, b, kinds, table.shape[-1])
    if coefficients is None and bool(left.any()):
        some = left > 0
        R[some] = cayley(skew(vectors[some]))
        y = None if x is None else rotated(x, R)
    return y, R


def _counts(x: Tensor | None, lead: torch.Size | tuple[int, ...], b: int) -> tuple[int, int, int]:
    """k, r, t; the latter 0 without x."""
    r, k = lead[-1], 1
    for n in lead[:-1]:
        k *= n
    return k, r, 0 if x is None else x.numel() // (k * r * b)


def _threads(tasks: int) -> int:
    return max(1, min(torch.get_num_threads(), tasks))


@lru_cache
def _table(coefficients: Coefficients) -> Tensor:
    """Of each polynomial a row: up to which ``|S^2|_F`` it is taken; the highest of the powers that
    it is evaluated by; and its coefficients, after their number, which is one more than a multiple
    of that."""
    if coefficients is None:
        # S's eigenvalues come in pairs: the largest is below (|S^2|_F^2 / 2)^(1/4).
        rows = [[math.sqrt(2) * m**2, step, *_inverse(n, m)] for m, n, step in INVERSES]
    else:
        rows = [[0.0, 2.0, *coefficients, *[0.0] * (1 - len(coefficients) % 2)]]
    longest = max(map(len, rows))
    rows = [[*r[:2], len(r) - 2, *r[2:], *[0.0] * (longest - len(r))] for r in rows]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


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
