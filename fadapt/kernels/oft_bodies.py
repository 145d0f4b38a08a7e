"""What the threads run of ``oft_loops.py``: a block of an adapter at a time, in a core's own cache.

A body is run by every thread, of the numbers that its call hands over; addresses are in bytes, and
strides in elements. All else is compiled into the bodies.
"""

from typing import Any

import numba
import numpy as np

from fadapt.kernels.openmp import inner, share, thread, unpacked
from fadapt.kernels.small_products import LANES, across, floats, product, symmetric

ROWS = 64  # of x, that a task rotates at a time


def turn(numbers: Any) -> None:
    """R of each block, where a polynomial gives it; and ``x R``, if there is x."""
    x, y, vectors, R, left, table, scratch, k, r, t, b, kinds, columns = unpacked(numbers, 13)
    size, width, m, count = b * b, r * b, b * (b - 1) // 2, k * r
    free = scratch + 4 * thread() * 7 * size
    start, stop = share(count)
    for i in range(start, stop):
        out = R + 4 * i * size if R else free + 4 * 6 * size
        ok = _build(vectors + 4 * i * m, table, kinds, columns, free, out, b)
        floats(left, count)[i] = 0.0 if ok else 1.0
        if ok and t:
            at = 4 * ((i // r) * t * width + (i % r) * b)
            product(y + at, width, x + at, width, 1, out, b, t, b, b, 1.0, False)


def rotate(numbers: Any) -> None:
    """``x R``; with scratch, ``x R^T``."""
    x, y, R, scratch, k, r, t, b = unpacked(numbers, 8)
    size, width, parts = b * b, r * b, (t + ROWS - 1) // ROWS
    turned = scratch + 4 * thread() * size
    start, stop = share(k * parts * r)
    for i in range(start, stop):
        j, first, a = i % r, (i // r) % parts * ROWS, i // (r * parts)
        block = R + 4 * (a * r + j) * size
        if scratch:
            across(block, b, turned, b, b, b, 1.0, False)
            block = turned
        at = 4 * ((a * t + first) * width + j * b)
        rows = min(ROWS, t - first)
        product(y + at, width, x + at, width, 1, block, b, rows, b, b, 1.0, False)


def outer(numbers: Any) -> None:
    """``x^T g``; and ``g R^T``, if there is R."""
    x, g, R, dx, out, scratch, k, r, t, b, shared, each = unpacked(numbers, 12)
    width = r * b
    a = scratch + 4 * thread() * each
    c = a + 4 * ROWS * b
    turned = c + 4 * ROWS * b
    start, stop = share(k * r)
    for i in range(start, stop):
        to = out + 4 * i * b * b
        if R:
            across(R + 4 * (i // r if shared else i) * b * b, b, turned, b, b, b, 1.0, False)
        for first in range(0, t, ROWS):
            rows = min(ROWS, t - first)
            at = 4 * ((i // r * t + first) * width + i % r * b)
            # In one piece: columns of a matrix fall into the same few lines of a cache.
            _copy(x + at, width, a, b, rows, b)
            _copy(g + at, width, c, b, rows, b)
            product(to, b, a, 1, b, c, b, b, b, rows, 1.0, first > 0)
            if R:
                product(dx + at, width, c, b, 1, turned, b, rows, b, b, 1.0, False)


def back_exact(numbers: Any) -> None:
    """Of the exact form, the gradients of ``x R`` with respect to x and R's vectors."""
    x, g, R, dx, dv, scratch, k, r, t, b, _, _, _, each = unpacked(numbers, 14)
    width, m = r * b, b * (b - 1) // 2
    turned = scratch + 4 * thread() * each
    E = turned + 4 * b * b
    y = E + 4 * b * b
    d, h = y + 4 * t * b, y + 8 * t * b
    start, stop = share(k * r)
    for i in range(start, stop):
        at, block = 4 * (i // r * t * width + i % r * b), R + 4 * i * b * b
        into, ld = (dx + at, width) if dx else (d, b)
        across(block, b, turned, b, b, b, 1.0, False)
        product(into, ld, g + at, width, 1, turned, b, t, b, b, 1.0, False)
        _add(g + at, width, into, ld, h, t, b)
        _copy(x + at, width, y, b, t, b)
        product(y, b, x + at, width, 1, block, b, t, b, b, 1.0, True)
        product(E, b, y, 1, b, h, b, b, b, t, -0.5, False)
        _fold(E, dv + 4 * i * m, b)


def back_series(numbers: Any) -> None:
    """Of a series, the same."""
    x, g, vectors, dx, dv, scratch, k, r, t, b, degree, sign, last, each = unpacked(numbers, 14)
    width, m, step = r * b, b * (b - 1) // 2, 4 * t * b
    Q = scratch + 4 * thread() * each
    E = Q + 4 * b * b
    X = E + 4 * b * b
    W = X + degree * step  # the last first, beside the power of x that it belongs to
    start, stop = share(k * r)
    for i in range(start, stop):
        at = 4 * (i // r * t * width + i % r * b)
        _skew(vectors + 4 * i * m, Q, b)
        _copy(x + at, width, X, b, t, b)
        first = W + (degree - 1) * step
        _scaled(g + at, width, last / 2, first, t, b)
        for n in range(1, degree):
            product(X + n * step, b, X + (n - 1) * step, b, 1, Q, b, t, b, b, sign, False)
            to = W + (degree - 1 - n) * step
            _copy(g + at, width, to, b, t, b)
            product(to, b, to + step, b, 1, Q, b, t, b, b, -sign, True)
        if dx:
            _copy(g + at, width, dx + at, width, t, b)
            product(dx + at, width, W, b, 1, Q, b, t, b, b, -2.0 * sign, True)
        product(E, b, X, 1, b, W, b, b, b, degree * t, 2.0 * sign, False)
        _fold(E, dv + 4 * i * m, b)


def build_back_exact(numbers: Any) -> None:
    """Of the exact form, the gradient of R with respect to its vectors."""
    R, g, dv, scratch, count, b = unpacked(numbers, 6)
    half = scratch + 4 * thread() * 3 * b * b
    flipped, E = half + 4 * b * b, half + 8 * b * b
    start, stop = share(count)
    for i in range(start, stop):
        _copy(R + 4 * i * b * b, b, half, b, b, b)
        _plus(half, 1.0, b)
        across(half, b, flipped, b, b, b, 1.0, False)
        product(E, b, half, 1, b, g + 4 * i * b * b, b, b, b, b, 1.0, False)
        product(half, b, E, b, 1, flipped, b, b, b, b, -0.5, False)
        _fold(half, dv + 4 * i * (b * (b - 1) // 2), b)


def build_back_series(numbers: Any) -> None:
    """Of a series, the same.

    Back through Horner's scheme in P = Q^2, ``A_j = A_(j+1) P + c_2j I + c_(2j+1) Q``. P is
    symmetric; its gradient G reaches Q as ``-(G Q + Q G)``, and that folds to what
    ``-(G + G^T) Q`` does: one product for two.
    """
    vectors, g, dv, table, scratch, count, b, terms, each = unpacked(numbers, 9)
    size, m, top = b * b, b * (b - 1) // 2, terms // 2 - 1
    Q = scratch + 4 * thread() * each
    P, E, G = Q + 4 * size, Q + 8 * size, Q + 12 * size
    moved, sums = Q + 16 * size, Q + 24 * size  # two of the former, and A_1 to A_top
    c = floats(table, 3 + terms)[3:]
    start, stop = share(count)
    for i in range(start, stop):
        _skew(vectors + 4 * i * m, Q, b)
        last = g + 4 * i * size
        _scaled(last, b, c[1], E, b, b)
        if terms > 2:
            symmetric(P, Q, Q, b, False)
            for j in range(top, 0, -1):
                A = sums + 4 * j * size
                _scaled(Q, b, c[2 * j + 1], A, b, b)
                _plus(A, c[2 * j], b)
                if j < top:
                    product(A, b, A + 4 * size, b, 1, P, b, b, b, b, 1.0, True)
                elif terms % 2:
                    _more(P, c[terms - 1], A, size)
            _scaled(Q, b, 0.0, G, b, b)
            for j in range(1, top + 1):
                product(G, b, sums + 4 * j * size, 1, b, last, b, b, b, b, 1.0, True)
                into = moved + 4 * (j % 2) * size
                product(into, b, last, b, 1, P, b, b, b, b, 1.0, False)
                last = into
                _more(last, c[2 * j + 1], E, size)
            if terms % 2:
                _more(last, c[terms - 1], G, size)
            across(G, b, P, b, b, b, 1.0, False)
            _more(G, 1.0, P, size)
            product(E, b, P, b, 1, Q, b, b, b, b, -1.0, True)
        _fold(E, dv + 4 * i * m, b)


@inner
def _build(vector: int, table: int, kinds: int, columns: int, free: int, out: int, b: int) -> bool:
    """R into ``out``, unless Q is too large for every polynomial, or not finite."""
    size = b * b
    Q, P, P2 = free, free + 4 * size, free + 8 * size
    one, two = free + 16 * size, free + 20 * size
    _skew(vector, Q, b)
    symmetric(P, Q, Q, b, False)
    if kinds == 0:
        _polynomial(Q, floats(table, columns), one, two, out, b, False)
        return True
    symmetric(P2, P, P, b, False)
    norm, kind = np.sqrt(_squares(floats(P2, size))), 0
    while kind < kinds and not norm <= floats(table + 4 * kind * columns, 1)[0]:
        kind += 1
    if kind == kinds:
        return False
    row = floats(table + 4 * kind * columns, columns)
    if row[1] == 3:
        symmetric(free + 12 * size, P2, P, b, False)
    _polynomial(P, row, one, two, two, b, True)
    q, p = floats(Q, size), floats(P, size)
    for i in range(size):
        q[i] = p[i] - q[i]
    product(out, b, Q, b, 1, two, b, b, b, b, 1.0, False)
    _plus(out, 1.0, b)
    return True


@inner
def _polynomial(powers: int, row: Any, one: int, two: int, out: int, b: int, even: bool) -> None:
    """``sum_k c_k X^k`` into ``out``, of X, X^2, ... in one piece, with two buffers, of which
    ``out`` may be the second: Horner's scheme in the last power. Even ones are symmetric."""
    step, count = int(row[1]), int(row[2])
    last = powers + 4 * (step - 1) * b * b
    groups = (count - 1) // step
    for n in range(groups - 1, -1, -1):
        # The buffers take turns so that the last is `out`.
        to = out if n == 0 else (one if n % 2 else two)
        _sum(powers, row[4 + n * step :], step, to, b)
        if n < groups - 1:
            before = one if n % 2 == 0 else two
            if even:
                symmetric(to, before, last, b, True)
            else:
                product(to, b, before, b, 1, last, b, b, b, b, 1.0, True)
    _plus(out, row[3], b)


@inner
def _sum(powers: int, c: Any, step: int, out: int, b: int) -> None:
    size = b * b
    x, x2 = floats(powers, size), floats(powers + 4 * size, size)
    x3 = floats(powers + 8 * size, size)
    y = floats(out, size)
    if step == 2:
        for i in range(size):
            y[i] = c[0] * x[i] + c[1] * x2[i]
    else:
        for i in range(size):
            y[i] = c[0] * x[i] + c[1] * x2[i] + c[2] * x3[i]


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _squares(x: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@inner
def _skew(vector: int, Q: int, b: int) -> None:
    v, q, at = floats(vector, b * (b - 1) // 2), floats(Q, b * b), -1
    for i in range(b):
        for j in range(i - i % LANES, i + 1):
            q[i * b + j] = 0
        for j in range(i + 1, b):
            q[i * b + j] = v[at + j]
        at += b - i - 2
    for i in range(0, b, LANES):
        n = min(LANES, b - i)
        across(Q + 4 * i * (b + 1), b, Q + 4 * i * (b + 1), b, n, n, -1.0, True)
        across(Q + 4 * (i * b + i + n), b, Q + 4 * ((i + n) * b + i), b, b - i - n, n, -1.0, False)


@inner
def _fold(E: int, vector: int, b: int) -> None:
    """The adjoint of :func:`_skew`, of E, which is written to."""
    v, e, at = floats(vector, b * (b - 1) // 2), floats(E, b * b), -1
    for i in range(0, b, LANES):
        n = min(LANES, b - i)
        across(E + 4 * i * (b + 1), b, E + 4 * i * (b + 1), b, n, n, -1.0, True)
        across(E + 4 * ((i + n) * b + i), b, E + 4 * (i * b + i + n), b, n, b - i - n, -1.0, True)
    for i in range(b):
        for j in range(i + 1, b):
            v[at + j] = e[i * b + j]
        at += b - i - 2


@inner
def _plus(A: int, number: float, b: int) -> None:
    a = floats(A, b * b)
    for i in range(b):
        a[i * b + i] += np.float32(number)


@inner
def _copy(A: int, lda: int, out: int, ldc: int, rows: int, b: int) -> None:
    for i in range(rows):
        a, c = floats(A + 4 * i * lda, b), floats(out + 4 * i * ldc, b)
        for j in range(b):
            c[j] = a[j]


@inner
def _scaled(A: int, lda: int, number: float, out: int, rows: int, b: int) -> None:
    for i in range(rows):
        a, c = floats(A + 4 * i * lda, b), floats(out + 4 * i * b, b)
        for j in range(b):
            c[j] = np.float32(number) * a[j]


@inner
def _more(A: int, number: float, out: int, size: int) -> None:
    a, c = floats(A, size), floats(out, size)
    for j in range(size):
        c[j] += np.float32(number) * a[j]


@inner
def _add(A: int, lda: int, B: int, ldb: int, out: int, rows: int, b: int) -> None:
    for i in range(rows):
        a, c, d = floats(A + 4 * i * lda, b), floats(B + 4 * i * ldb, b), floats(out + 4 * i * b, b)
        for j in range(b):
            d[j] = a[j] + c[j]
