# mypy: disable-error-code="no-untyped-def"
"""The kernels of ``oft_gpu.py``: OFT's blocks, each of ``size x size`` in a tile of ``width``."""

import triton
import triton.language as tl


@triton.jit
def exact_dot(a, b):
    """Of float32, in float32: TF32, Triton's own choice, has 11 of its 24 bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _at(i, j, size: tl.constexpr):
    """Offset and mask of elements of a block."""
    return i * size + j, (i < size) & (j < size)


@triton.jit
def _skewed(vector, i, j, size: tl.constexpr):
    """Elements of Q, from its upper triangle by rows."""
    low = tl.minimum(i, j)
    place = low * (2 * size - low - 1) // 2 + tl.maximum(i, j) - low - 1
    value = tl.load(vector + place, mask=(i != j) & (i < size) & (j < size), other=0.0)
    return tl.where(i < j, value, -value)


@triton.jit
def _times(a, b, skew_a, skew_b, size: tl.constexpr, width: tl.constexpr, step: tl.constexpr):
    """``a b`` of two blocks in memory, each as it lies (0), skew-symmetric from its vector (1), or
    ``(a + I)^T`` (2)."""
    rows = tl.arange(0, width)
    total = tl.zeros((width, width), tl.float32)
    for start in range(0, width, step):
        some = start + tl.arange(0, step)
        left = _read(a, rows[:, None], some[None, :], skew_a, size)
        right = _read(b, some[:, None], rows[None, :], skew_b, size)
        total += exact_dot(left, right)
    return total


@triton.jit
def _read(a, i, j, how: tl.constexpr, size: tl.constexpr):
    if how == 1:
        value = _skewed(a, i, j, size)
    elif how == 2:
        place, inside = _at(j, i, size)
        value = tl.load(a + place, mask=inside, other=0.0) + tl.where(i == j, 1.0, 0.0)
    else:
        place, inside = _at(i, j, size)
        value = tl.load(a + place, mask=inside, other=0.0)
    return value


@triton.jit
def _inverse(M, size: tl.constexpr, width: tl.constexpr):
    """By Gauss and Jordan, in place. M's symmetric part is I, so no pivot is below 1."""
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    for k in range(size):
        row = tl.sum(tl.where(i == k, M, 0.0), 0)[None, :]
        column = tl.sum(tl.where(j == k, M, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where(j == k, row, 0.0), 1)[:, None]
        row = tl.where(j == k, 1.0, row) / pivot
        M = tl.where(i == k, row, tl.where(j == k, 0.0, M) - column * row)
    return M


@triton.jit
def build(
    vectors, R, spare, sign, last,
    degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """R of one block, from its vector; ``spare`` holds a matrix of each."""
    n = tl.program_id(0).to(tl.int64)
    vector, R, spare = (
        vectors + n * (size * (size - 1) // 2),
        R + n * size * size,
        spare + n * size * size,
    )
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = _at(i, j, size)
    eye = tl.where(i == j, 1.0, 0.0)
    Q = _skewed(vector, i, j, size)
    if degree == 0:
        tl.store(R + at, _inverse(eye + Q, size, width), mask=inside)
        tl.debug_barrier()
        # Newton's step, X + X (I - M X), M = I + Q: a large Q loses digits.
        X = tl.load(R + at, mask=inside, other=0.0)
        rest = eye - X - _times(vector, R, 1, 0, size, width, step)
        tl.store(spare + at, rest, mask=inside)
        tl.debug_barrier()
        X += _times(R, spare, 0, 0, size, width, step)
        tl.debug_barrier()
        tl.store(R + at, 2 * X - eye, mask=inside)
    else:
        tl.store(R + at, 2 * eye + last * sign * Q, mask=inside)
        for _ in range(degree - 1):
            tl.debug_barrier()
            P = 2 * eye + sign * _times(vector, R, 1, 0, size, width, step)
            tl.debug_barrier()
            tl.store(R + at, P, mask=inside)
        tl.store(R + at, tl.load(R + at, mask=inside, other=0.0) - eye, mask=inside)


@triton.jit
def build_backward(
    vectors, R, g, spare, out, sign, last,
    degree: tl.constexpr, size: tl.constexpr, width: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """A vector's gradient from that of R; ``spare`` holds two matrices of each block."""
    n = tl.program_id(0).to(tl.int64)
    length: tl.constexpr = size * (size - 1) // 2
    vector, R, g, out = (
        vectors + n * length,
        R + n * size * size,
        g + n * size * size,
        out + n * length,
    )
    first, second = spare + 2 * n * size * size, spare + (2 * n + 1) * size * size
    i = tl.arange(0, width)[:, None]
    j = tl.arange(0, width)[None, :]
    at, inside = _at(i, j, size)
    if degree == 0:
        # -1/2 (R + I)^T G (R + I)^T
        tl.store(first + at, _times(R, g, 2, 0, size, width, step), mask=inside)
        tl.debug_barrier()
        S = -0.5 * _times(first, R, 0, 2, size, width, step)
    else:
        # P_k = c_k I + Q P_(k+1), and with H_k = G P_k^T the gradient is S_1,
        # where S_k = H_k + Q^T S_(k+1).
        G = tl.load(g + at, mask=inside, other=0.0)
        S = last * G
        tl.store(first + at, S, mask=inside)
        tl.store(second + at, S, mask=inside)
        for _ in range(degree - 1):
            tl.debug_barrier()
            H = 2 * G - sign * _times(first, vector, 0, 1, size, width, step)
            S = H - sign * _times(vector, second, 1, 0, size, width, step)
            tl.debug_barrier()
            tl.store(first + at, H, mask=inside)
            tl.store(second + at, S, mask=inside)
        S = sign * S
    place = i * (2 * size - i - 1) // 2 + j - i - 1
    tl.store(out + place, S - tl.trans(S), mask=(i < j) & (j < size))


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
    if values.dtype == tl.bfloat16:  # x is exact so, and R of two parts has 16 bits
        high = turn.to(tl.bfloat16)
        product = tl.dot(values, (turn - high.to(tl.float32)).to(tl.bfloat16))
        product = tl.dot(values, high, product)
    else:
        product = exact_dot(values.to(tl.float32), turn)
    tl.store(y + place, product, mask=inside)


@triton.jit
def outer(
    x, g, out, t, wide,
    size: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """``x^T g`` of one block, over all rows."""
    block = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, tile)[None, :]
    total = tl.zeros((tile, tile), tl.float32)
    for start in range(0, t, rows):
        row = (start + tl.arange(0, rows)).to(tl.int64)[:, None]
        inside = (row < t) & (j < size)
        place = (k * t + row) * wide + block * size + j
        a = tl.load(x + place, mask=inside, other=0.0)
        b = tl.load(g + place, mask=inside, other=0.0)
        if a.dtype == tl.float32 or b.dtype == tl.float32:
            total += exact_dot(tl.trans(a.to(tl.float32)), b.to(tl.float32))
        else:
            total += tl.dot(tl.trans(a), b)
    at, inside = _at(tl.arange(0, tile)[:, None], j, size)
    tl.store(out + (k * (wide // size) + block) * size * size + at, total, mask=inside)
