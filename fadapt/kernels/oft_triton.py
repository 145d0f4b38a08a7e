# mypy: disable-error-code="no-untyped-def"
"""The kernels of ``oft_gpu.py``: OFT's blocks, each of ``size x size`` in a tile of ``width``."""

import triton
import triton.language as tl

# Newton's last step begins at an |E|_F^2 below it, and leaves an E of half an eps of float32.
ENOUGH = tl.constexpr(5e-8)
MOST_STEPS = tl.constexpr(64)  # it begins with one for each factor of 2 in |Q|^2
CLOSE = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


@triton.jit
def exact_dot(a, b):
    """Of float32, in float32: TF32, Triton's own choice, has 11 of its 24 bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def close_dot(a, b):
    """Of float32, each factor as three numbers of bfloat16, which hold its 24 bits: as exact, on
    tensor cores. (TF32 in three parts has 22 bits, and wants the second factor transposed.)"""
    return tl.dot(a, b, input_precision=CLOSE)


@triton.jit
def at_of(i, j, size: tl.constexpr):
    """Offset and mask of elements of a block."""
    return i * size + j, (i < size) & (j < size)


@triton.jit
def skewed(vector, i, j, size: tl.constexpr):
    """Elements of Q, from its upper triangle by rows."""
    low = tl.minimum(i, j)
    place = low * (2 * size - low - 1) // 2 + tl.maximum(i, j) - low - 1
    value = tl.load(vector + place, mask=(i != j) & (i < size) & (j < size), other=0.0)
    return tl.where(i < j, value, -value)


@triton.jit
def build(
    vectors, R, sign, last, degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """R of one block, from its vector."""
    n = tl.program_id(0).to(tl.int64)
    vector, R = vectors + n * (size * (size - 1) // 2), R + n * size * size
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = at_of(i, j, size)
    eye = tl.where((i == j) & inside, 1.0, 0.0)
    Q = sign * skewed(vector, i, j, size)
    if degree == 0:
        # Newton and Schulz: X + X E of E = I - (I + Q) X, which squares E. It begins at
        # X = s (I - Q), s = 2 / (2 + T), where (I + Q) X = s (I - Q^2) lies between s and
        # s (1 + T): T bounds the square of Q's largest eigenvalue, which comes in pairs.
        P = close_dot(Q, Q)
        bound = tl.minimum(0.5 * square(Q), tl.sqrt(0.5 * square(P)))
        start = 2 / (2 + bound)
        X = start * (eye - Q)
        E = (1 - start) * eye + start * P
        wrong, before, again, n = square(E), tl.full((), 2.0, tl.float32), start == start, 0
        while again:
            X += close_dot(X, E)
            # Below 1/4 it falls to a fourth at least, or it is rounding that is left.
            falls = (before > 0.25) | (4 * wrong < before)
            again = (wrong > ENOUGH) & falls & (n < MOST_STEPS)
            if again:
                E = eye - X - close_dot(Q, X)
                before = wrong
                wrong = square(E)
                n += 1
        tl.store(R + at, 2 * X - eye, mask=inside)
    else:
        tl.store(R + at, series(Q, eye, last, degree), mask=inside)


@triton.jit
def series(Q, eye, last, degree: tl.constexpr):
    """R of Q, its sign being that of the series; of -Q, R's transpose."""
    P = Q
    if degree != 1:
        P = close_dot(Q, Q)
    # By Horner in P, the series beginning with 2 I: A_k = A_(k+1) P + 2 I + 2 Q.
    A = highest(Q, P, eye, last, degree)
    for _ in range((degree - 1) // 2):
        A = close_dot(A, P) + 2 * (eye + Q)
    return A - eye


@triton.jit
def square(A):
    """``|A|_F^2``."""
    return tl.sum(tl.sum(A * A, 1), 0)


@triton.jit
def highest(Q, P, eye, last, degree: tl.constexpr):
    """The first of Horner's sums, with the highest power: of an even degree, that of P."""
    if degree % 2 == 0:
        A = 2 * (eye + Q) + last * P
    else:
        A = 2 * eye + last * Q
    return A


@triton.jit
def build_backward(
    vectors, R, g, spare, out, sign, last,
    degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A vector's gradient from that of R; of more than six terms, ``spare`` holds the sums of
    Horner's scheme."""
    n = tl.program_id(0).to(tl.int64)
    length: tl.constexpr = size * (size - 1) // 2
    top: tl.constexpr = 0 if degree == 0 else (degree - 1) // 2
    vector, R, g, out = (
        vectors + n * length,
        R + n * size * size,
        g + n * size * size,
        out + n * length,
    )
    sums = spare + n * top * size * size
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = at_of(i, j, size)
    eye = tl.where((i == j) & inside, 1.0, 0.0)
    G = tl.load(g + at, mask=inside, other=0.0)
    if degree == 0:
        # -1/2 (R + I)^T G (R + I)^T
        half = tl.load(R + j * size + i, mask=inside, other=0.0) + eye
        S = close_dot(half, G)
        S = -0.5 * close_dot(S, half)
    else:
        Q = sign * skewed(vector, i, j, size)
        S = sign * series_back(Q, G, eye, sums, at, inside, last, degree, size)
    fold(S, out, i, j, size)


@triton.jit
def fold(S, out, i, j, size: tl.constexpr):
    """Store the vector's gradient, from that of Q."""
    place = i * (2 * size - i - 1) // 2 + j - i - 1
    tl.store(out + place, S - tl.trans(S), mask=(i < j) & (j < size))


@triton.jit
def series_back(
    Q, G, eye, sums, at, inside, last, degree: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """The gradient of Q from that of R; of more than six terms, ``sums`` holds those of Horner's
    scheme."""
    top: tl.constexpr = (degree - 1) // 2
    if degree == 1:
        S = last * G
    else:
        # Back through Horner's scheme, as build_back_series of oft_bodies.py. A_k^T is A_k of -Q.
        P = close_dot(Q, Q)
        A = highest(-Q, P, eye, last, degree)
        if top > 1:
            for k in range(top - 1):
                tl.store(sums + (top - 1 - k) * size * size + at, A, mask=inside)
                A = close_dot(A, P) + 2 * (eye - Q)
            tl.store(sums + at, A, mask=inside)
            tl.debug_barrier()
        S, of_P = tl.zeros_like(Q), tl.zeros_like(Q)
        for k in range(top):
            S += 2 * G
            if top > 1:
                A = tl.load(sums + k * size * size + at, mask=inside, other=0.0)
            of_P += close_dot(A, G)
            G = close_dot(G, P)
        if degree % 2 == 0:
            S += 2 * G
            of_P += last * G
        else:
            S += last * G
        of_P += tl.trans(of_P)
        S -= close_dot(of_P, Q)
    return S


@triton.jit
def _turned(values, turn):
    """``values turn``, in float32, of which ``turn`` is."""
    if values.dtype == tl.bfloat16:  # which is exact, and of two parts the other has 16 bits
        high = turn.to(tl.bfloat16)
        product = tl.dot(values, (turn - high.to(tl.float32)).to(tl.bfloat16))
        product = tl.dot(values, high, product)
    else:
        product = exact_dot(values.to(tl.float32), turn)
    return product


@triton.jit
def _gram(a, b):
    """``a^T b``, in float32."""
    if a.dtype == tl.float32 or b.dtype == tl.float32:
        product = exact_dot(tl.trans(a.to(tl.float32)), b.to(tl.float32))
    else:
        product = tl.dot(tl.trans(a), b)
    return product


@triton.jit
def _over_rows(
    x, g, dx, back, k, block, t, wide,
    needs_x: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """``x^T g`` of one block, over all rows; and ``g back`` into dx, if x needs a gradient."""
    j = tl.arange(0, tile)[None, :]
    total = tl.zeros((tile, tile), tl.float32)
    for start in range(0, t, rows):
        row = (start + tl.arange(0, rows)).to(tl.int64)[:, None]
        inside = (row < t) & (j < size)
        place = (k * t + row) * wide + block * size + j
        a = tl.load(x + place, mask=inside, other=0.0)
        b = tl.load(g + place, mask=inside, other=0.0)
        if needs_x:
            tl.store(dx + place, _turned(b, back), mask=inside)
        total += _gram(a, b)
    return total


@triton.jit
def rotate(
    x, R, y, t, wide, R_k, R_r, R_i, R_j,
    size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """``x R`` for some rows of x and one block."""
    block = tl.program_id(1)
    k = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    i = tl.arange(0, tile)[:, None]
    j = tl.arange(0, tile)[None, :]
    inside = (row < t) & (j < size)
    at = R + k * R_k + block * R_r + i * R_i + j * R_j
    turn = tl.load(at, mask=(i < size) & (j < size), other=0.0).to(tl.float32)
    place = (k * t + row) * wide + block * size + j
    values = tl.load(x + place, mask=inside, other=0.0)
    tl.store(y + place, _turned(values, turn), mask=inside)


@triton.jit
def rotate_back(
    x, g, R, dx, out, t, wide, R_k, R_r, R_i, R_j,
    needs_x: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Both gradients of ``rotate``, ``g R^T`` and ``x^T g``, of one block, over all rows."""
    block = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, tile)[:, None]
    j = tl.arange(0, tile)[None, :]
    at = R + k * R_k + block * R_r + j * R_i + i * R_j
    back = tl.load(at, mask=(i < size) & (j < size), other=0.0).to(tl.float32)
    total = _over_rows(x, g, dx, back, k, block, t, wide, needs_x, size, tile, rows)
    at, inside = at_of(i, j, size)
    tl.store(out + (k * (wide // size) + block) * size * size + at, total, mask=inside)


@triton.jit
def outer(
    x, g, out, t, wide,
    size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """``x^T g`` of one block, over all rows."""
    block = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, tile)[None, :]
    total = _over_rows(x, g, out, 0, k, block, t, wide, False, size, tile, rows)
    at, inside = at_of(tl.arange(0, tile)[:, None], j, size)
    tl.store(out + (k * (wide // size) + block) * size * size + at, total, mask=inside)


@triton.jit
def turn(
    x, vectors, y, t, wide, sign, last,
    degree: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """``rotate`` by the series of a block's vector."""
    block = tl.program_id(1)
    k = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)[:, None]
    i = tl.arange(0, tile)[:, None]
    j = tl.arange(0, tile)[None, :]
    vector = vectors + (k * (wide // size) + block) * (size * (size - 1) // 2)
    eye = tl.where((i == j) & (i < size), 1.0, 0.0)
    R = series(sign * skewed(vector, i, j, size), eye, last, degree)
    inside = (row < t) & (j < size)
    place = (k * t + row) * wide + block * size + j
    values = tl.load(x + place, mask=inside, other=0.0)
    tl.store(y + place, _turned(values, R), mask=inside)


@triton.jit
def turn_back(
    x, g, vectors, spare, dx, out, t, wide, sign, last,
    needs_x: tl.constexpr,
    degree: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """The gradients of ``turn``, of one block, over all rows."""
    block = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    n = k * (wide // size) + block
    length: tl.constexpr = size * (size - 1) // 2
    i = tl.arange(0, tile)[:, None]
    j = tl.arange(0, tile)[None, :]
    at, within = at_of(i, j, size)
    eye = tl.where((i == j) & within, 1.0, 0.0)
    Q = sign * skewed(vectors + n * length, i, j, size)
    back = series(-Q, eye, last, degree)
    total = _over_rows(x, g, dx, back, k, block, t, wide, needs_x, size, tile, rows)
    sums = spare + n * ((degree - 1) // 2) * size * size
    S = sign * series_back(Q, total, eye, sums, at, within, last, degree, size)
    fold(S, out + n * length, i, j, size)
