# mypy: disable-error-code="no-untyped-def"
"""``build`` and ``build_backward`` of ``oft_triton.py`` for blocks of more than 64: registers have
room for one of their matrices, and the others lie in memory, where a program finds them in L2."""

import triton
import triton.language as tl

from fadapt.kernels.oft_triton import CLOSE, ENOUGH, MOST_STEPS, at_of, highest, skewed, square

STEP = tl.constexpr(32)  # how much of two blocks is multiplied at a time
STAGES = tl.constexpr(3)  # and how many such are loaded meanwhile


@triton.jit
def _product(a, b, total, size: tl.constexpr, width: tl.constexpr):
    """``total + a b``, of two blocks in memory."""
    rows = tl.arange(0, width)
    for start in tl.range(0, width, STEP, num_stages=STAGES):
        some = start + tl.arange(0, STEP)
        of_a, held_a = at_of(rows[:, None], some[None, :], size)
        of_b, held_b = at_of(some[:, None], rows[None, :], size)
        x = tl.load(a + of_a, mask=held_a, other=0.0)
        y = tl.load(b + of_b, mask=held_b, other=0.0)
        total = tl.dot(x, y, total, input_precision=CLOSE)
    return total


@triton.jit
def _put(place, at, inside, value):
    """Store a block that others of the program's threads may still be reading, and will read."""
    tl.debug_barrier()
    tl.store(place + at, value, mask=inside)
    tl.debug_barrier()


@triton.jit
def build(
    vectors, R, spare, sign, last,
    degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """R of one block, from its vector; ``spare`` holds two matrices of each."""
    n = tl.program_id(0).to(tl.int64)
    area: tl.constexpr = size * size
    vector, R = vectors + n * (size * (size - 1) // 2), R + n * area
    of_Q, other = spare + 2 * n * area, spare + (2 * n + 1) * area
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = at_of(i, j, size)
    eye = tl.where((i == j) & inside, 1.0, 0.0)
    none = tl.zeros((width, width), tl.float32)
    Q = sign * skewed(vector, i, j, size)
    if degree == 1:
        tl.store(R + at, eye + last * Q, mask=inside)
    else:
        _put(of_Q, at, inside, Q)
        P = _product(of_Q, of_Q, none, size, width)
        Q = tl.load(of_Q + at, mask=inside, other=0.0)
        if degree == 0:
            # As there; X lies where R will, and E in ``other``.
            bound = tl.minimum(0.5 * square(Q), tl.sqrt(0.5 * square(P)))
            start = 2 / (2 + bound)
            E = (1 - start) * eye + start * P
            _put(other, at, inside, E)
            wrong, before, again, n = square(E), tl.full((), 2.0, tl.float32), start == start, 0
            _put(R, at, inside, start * (eye - Q))
            while again:
                X = tl.load(R + at, mask=inside, other=0.0)
                _put(R, at, inside, _product(R, other, X, size, width))
                falls = (before > 0.25) | (4 * wrong < before)
                again = (wrong > ENOUGH) & falls & (n < MOST_STEPS)
                if again:
                    E = -_product(of_Q, R, none, size, width)
                    E += eye - tl.load(R + at, mask=inside, other=0.0)
                    _put(other, at, inside, E)
                    before = wrong
                    wrong = square(E)
                    n += 1
            X = tl.load(R + at, mask=inside, other=0.0)
            tl.store(R + at, 2 * X - eye, mask=inside)
        else:
            # The sums of Horner's scheme lie where R will, and P in ``other``.
            A = highest(Q, P, eye, last, degree)
            if degree > 2:
                _put(other, at, inside, P)
                for _ in range((degree - 1) // 2):
                    _put(R, at, inside, A)
                    A = _product(R, other, none, size, width)
                    A += 2 * (eye + tl.load(of_Q + at, mask=inside, other=0.0))
                tl.debug_barrier()
            tl.store(R + at, A - eye, mask=inside)


@triton.jit
def build_backward(
    vectors, R, g, spare, out, sign, last,
    degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A vector's gradient from that of R; ``spare`` holds three matrices of each block; five, and
    Horner's sums, where there are several of these."""
    n = tl.program_id(0).to(tl.int64)
    area: tl.constexpr = size * size
    top: tl.constexpr = 0 if degree == 0 else (degree - 1) // 2
    vector, R, g = vectors + n * (size * (size - 1) // 2), R + n * area, g + n * area
    out += n * (size * (size - 1) // 2)
    spare += n * (5 + top if top > 1 else 3) * area
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = at_of(i, j, size)
    eye = tl.where((i == j) & inside, 1.0, 0.0)
    none = tl.zeros((width, width), tl.float32)
    if degree == 0:
        # -1/2 (R + I)^T G (R + I)^T
        half, first = spare, spare + area
        H = tl.load(R + j * size + i, mask=inside, other=0.0) + eye
        _put(half, at, inside, H)
        _put(first, at, inside, _product(half, g, none, size, width))
        S = -0.5 * _product(first, half, none, size, width)
    elif degree == 1:
        S = sign * last * tl.load(g + at, mask=inside, other=0.0)
    else:
        # Back through Horner's scheme, as there.
        of_Q, of_P, of_W = spare, spare + area, spare + 2 * area
        sums = of_W if top == 1 else spare + 5 * area  # the one sum is read before W is written
        _put(of_Q, at, inside, sign * skewed(vector, i, j, size))
        P = _product(of_Q, of_Q, none, size, width)
        G = tl.load(g + at, mask=inside, other=0.0)
        S, W = none, none
        if top > 0:
            _put(of_P, at, inside, P)
            A = highest(-tl.load(of_Q + at, mask=inside, other=0.0), P, eye, last, degree)
            for k in range(top - 1):
                _put(sums + (top - 1 - k) * area, at, inside, A)
                A = _product(sums + (top - 1 - k) * area, of_P, none, size, width)
                A += 2 * (eye - tl.load(of_Q + at, mask=inside, other=0.0))
            _put(sums, at, inside, A)
            W = _product(sums, g, none, size, width)
            _put(of_W, at, inside, W)
            G = _product(g, of_P, none, size, width)
            S = 2 * tl.load(g + at, mask=inside, other=0.0)
            if top > 1:
                of_S, of_G = spare + 3 * area, spare + 4 * area
                for k in range(1, top):
                    _put(of_S, at, inside, S + 2 * G)
                    _put(of_G, at, inside, G)
                    W = tl.load(of_W + at, mask=inside, other=0.0)
                    W = _product(sums + k * area, of_G, W, size, width)
                    _put(of_W, at, inside, W)
                    G = _product(of_G, of_P, none, size, width)
                    S = tl.load(of_S + at, mask=inside, other=0.0)
            W = tl.load(of_W + at, mask=inside, other=0.0)
        if degree % 2 == 0:
            W += last * G
            S += 2 * G
        else:
            S += last * G
        _put(of_W, at, inside, -W - tl.trans(W))
        S = sign * _product(of_W, of_Q, S, size, width)
    place = i * (2 * size - i - 1) // 2 + j - i - 1
    tl.store(out + place, S - tl.trans(S), mask=(i < j) & (j < size))
