# mypy: disable-error-code="no-untyped-def"
"""The kernels of ``dora_gpu.py``."""

import triton
import triton.language as tl

from fadapt.kernels.oft_triton import exact_dot


@triton.jit
def norms(
    W, squares, A, B, out, scaling, rows, wide, W_i, A_i, B_i, B_j,
    rank: tl.constexpr, width: tl.constexpr, tall: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """``|W + s B A|`` of some rows, by ``|W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``."""
    row = (tl.program_id(0) * tall + tl.arange(0, tall)).to(tl.int64)
    of_rank = tl.arange(0, width)
    products = tl.zeros((tall, width), tl.float32)
    gram = tl.zeros((width, width), tl.float32)
    for start in range(0, wide, step):
        column = start + tl.arange(0, step)
        w = tl.load(
            W + row[:, None] * W_i + column[None, :],
            mask=(row[:, None] < rows) & (column[None, :] < wide), other=0.0,
        ).to(tl.float32)  # fmt: skip
        a = tl.load(
            A + of_rank[:, None] * A_i + column[None, :],
            mask=(of_rank[:, None] < rank) & (column[None, :] < wide), other=0.0,
        ).to(tl.float32)  # fmt: skip
        products += exact_dot(w, tl.trans(a))
        gram += exact_dot(a, tl.trans(a))
    b = tl.load(
        B + row[:, None] * B_i + of_rank[None, :] * B_j,
        mask=(row[:, None] < rows) & (of_rank[None, :] < rank), other=0.0,
    ).to(tl.float32)  # fmt: skip
    cross = 2 * scaling * products + scaling * scaling * exact_dot(b, gram)
    total = tl.load(squares + row, mask=row < rows, other=0.0) + tl.sum(b * cross, 1)
    # What is negative, by rounding, is 0: a row that the update cancels.
    tl.store(out + row, tl.sqrt_rn(tl.maximum(total, 0.0)), mask=row < rows)
