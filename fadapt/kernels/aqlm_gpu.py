"""Products with an AQLM weight on a GPU, by Triton: of a few rows from the codes as they are read,
of many by a GEMM with W, decoded into scratch.

A thread decodes whole groups: it reads a code and then the vector, mostly 16 bytes, that the code
names. The plain torch that they must equal is ``decode`` in ``bases/aqlm_codes.py`` and a matrix
product.

AQLM's own kernels (``aqlm/inference_kernels/cuda_kernel.cu``) are not used. They take float16 and
bfloat16, three formats and inputs in multiples of 64 alone, and are slower but for one row of 2x8
(benchmarks/bases.py --graph). Of their transposed products those of 2x8 and 1x8 leave the scales
out, and all of them add the layer's bias to the gradient.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.kernels.gpu import DTYPES, launch, runs

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Rows up to which a product reads the codes; for more, W is decoded into scratch and multiplied by
# a GEMM. On an H100, 4096 x 4096 in bfloat16, GPU time in us by the codes for 1, 2, 3, 4 rows, and
# by scratch: 18, 19, 24, 25 and 34 (1x16); 13, 15, 20, 24 and 26 (2x8). A tensor-core form for up
# to 16 rows (30 and 40) and a transposed one (27 and 26) gain too little over scratch to keep.
MOST_ROWS = 4
TILE = 4096  # elements of W that a program decodes at a time, a thread 32


def usable(x: Tensor, codes: Tensor, codebooks: Tensor) -> bool:
    """Whether the kernels take ``x [..., *]`` and this weight."""
    return (
        runs(x)
        and x.dtype in DTYPES
        and x.numel() > 0
        and codes.stride(-1) == 1
        and codebooks.is_contiguous()
        and _powers(*codebooks.shape[1:])
    )


def multiply(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``x W^T``, ``[..., in] -> [..., out]``, in x's dtype with sums in float32."""
    n_rows = x.numel() // x.shape[-1]
    if n_rows > MOST_ROWS:
        return F.linear(x, decode(codes, codebooks, scales, x.dtype))
    out_groups, in_groups, _ = codes.shape
    _, _, out_group, in_group = codebooks.shape
    y = x.new_empty(*x.shape[:-1], out_groups * out_group)
    # A program of one warp, the fastest of a dozen: 1,024 elements at a time, of one or two rows
    # of groups.
    tall = 2 if n_rows <= 2 else 1
    wide = max(1, 1024 // (tall * out_group * in_group))
    launch(
        _multiply,
        (-(-out_groups // tall),),
        *(x.contiguous(), codes, codebooks, scales, y),
        *(out_groups, in_groups, codes.stride(0), codes.stride(1)),
        *(n_rows, *_format(codes, codebooks), tall, wide),
        warps=1,
    )
    return y


def multiply_transposed(g: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``g W``, ``[..., out] -> [..., in]``, in g's dtype with sums in float32."""
    return g @ decode(codes, codebooks, scales, g.dtype)


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """W ``[out, in]``, scaled: computed in float32 and rounded once to ``dtype``."""
    out_groups, in_groups, _ = codes.shape
    _, _, out_group, in_group = codebooks.shape
    weight = codebooks.new_empty(out_groups * out_group, in_groups * in_group, dtype=dtype)
    groups = TILE // (out_group * in_group)
    wide = min(256, groups, 1 << (in_groups - 1).bit_length())
    tall = groups // wide
    launch(
        _decode,
        (-(-out_groups // tall) * -(-in_groups // wide),),
        *(codes, codebooks, scales, weight),
        *(out_groups, in_groups, codes.stride(0), codes.stride(1)),
        *(*_format(codes, codebooks), tall, wide),
    )
    return weight


@cache
def _powers(size: int, out_group: int, in_group: int) -> bool:
    powers = all(n & (n - 1) == 0 for n in (size, out_group, in_group))
    return powers and out_group * in_group <= TILE


def _format(codes: Tensor, codebooks: Tensor) -> tuple[int, int, int, int, bool]:
    """The constants of a kernel; the last: two codes of a byte lie at even addresses."""
    books, size, out_group, in_group = codebooks.shape
    even = codes.stride(0) % 2 == codes.stride(1) % 2 == codes.data_ptr() % 2 == 0
    return books, size, out_group, in_group, books == 2 and codes.element_size() == 1 and even


if triton is not None:

    @triton.jit
    def _groups(
        codes,
        codebooks,
        o,
        i,
        inside,
        o_stride,
        i_stride,
        BOOKS: tl.constexpr,
        SIZE: tl.constexpr,
        OUT: tl.constexpr,
        IN: tl.constexpr,
        PAIRS: tl.constexpr,
    ):
        """The groups ``o`` x ``i`` of W before its scales: float32 ``[o, OUT, i, IN]``."""
        place = o[:, None].to(tl.int64) * o_stride + i[None, :].to(tl.int64) * i_stride
        element = tl.arange(0, OUT)[None, :, None, None] * IN + tl.arange(0, IN)
        if PAIRS:
            both = codes.to(tl.pointer_type(tl.int16)) + place // 2
            pair = tl.load(both, mask=inside, other=0).to(tl.int32)
        for m in tl.static_range(BOOKS):
            if PAIRS:
                code = (pair >> (8 * m)) & (SIZE - 1)
            else:
                code = tl.load(codes + place + m, mask=inside, other=0).to(tl.int32) & (SIZE - 1)
            vector = (code + m * SIZE)[:, None, :, None] * (OUT * IN)
            some = tl.load(codebooks + (vector + element)).to(tl.float32)
            if m == 0:
                total = some
            else:
                total += some
        return total

    @triton.jit
    def _decode(
        codes,
        codebooks,
        scales,
        weight,
        out_groups,
        in_groups,
        o_stride,
        i_stride,
        BOOKS: tl.constexpr,
        SIZE: tl.constexpr,
        OUT: tl.constexpr,
        IN: tl.constexpr,
        PAIRS: tl.constexpr,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        tiles = tl.cdiv(in_groups, WIDE)
        o = (tl.program_id(0) // tiles) * TALL + tl.arange(0, TALL)
        i = (tl.program_id(0) % tiles) * WIDE + tl.arange(0, WIDE)
        inside = (o < out_groups)[:, None] & (i < in_groups)[None, :]
        part = _groups(
            codes, codebooks, o, i, inside, o_stride, i_stride, BOOKS, SIZE, OUT, IN, PAIRS
        )
        scale = tl.load(scales + o, mask=o < out_groups, other=0).to(tl.float32)
        part *= scale[:, None, None, None]
        row = o[:, None, None, None].to(tl.int64) * OUT + tl.arange(0, OUT)[None, :, None, None]
        column = i[None, None, :, None] * IN + tl.arange(0, IN)
        to = weight + row * (in_groups * IN) + column
        tl.store(to, part.to(weight.dtype.element_ty), mask=inside[:, None, :, None])

    @triton.jit
    def _multiply(
        x,
        codes,
        codebooks,
        scales,
        y,
        out_groups,
        in_groups,
        o_stride,
        i_stride,
        ROWS: tl.constexpr,
        BOOKS: tl.constexpr,
        SIZE: tl.constexpr,
        OUT: tl.constexpr,
        IN: tl.constexpr,
        PAIRS: tl.constexpr,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        o = tl.program_id(0) * TALL + tl.arange(0, TALL)
        n_in, n_out = in_groups * IN, out_groups * OUT
        # A sum for each row: Triton would lay a tensor with an axis of rows out in another way
        # than W, and move W from one to the other at every step.
        sum0 = tl.zeros([TALL, OUT, WIDE, IN], tl.float32)
        sum1, sum2, sum3 = sum0, sum0, sum0
        for start in range(0, in_groups, WIDE):
            i = start + tl.arange(0, WIDE)
            inside = (o < out_groups)[:, None] & (i < in_groups)[None, :]
            part = _groups(
                codes, codebooks, o, i, inside, o_stride, i_stride, BOOKS, SIZE, OUT, IN, PAIRS
            )
            at = x + i[:, None] * IN + tl.arange(0, IN)[None, :]
            real = (i < in_groups)[:, None]
            sum0 += part * tl.load(at, mask=real, other=0).to(tl.float32)[None, None]
            if ROWS > 1:
                sum1 += part * tl.load(at + n_in, mask=real, other=0).to(tl.float32)[None, None]
            if ROWS > 2:
                sum2 += part * tl.load(at + 2 * n_in, mask=real, other=0).to(tl.float32)[None, None]
            if ROWS > 3:
                sum3 += part * tl.load(at + 3 * n_in, mask=real, other=0).to(tl.float32)[None, None]
        _store_row(sum0, scales, y, o, out_groups, OUT)
        if ROWS > 1:
            _store_row(sum1, scales, y + n_out, o, out_groups, OUT)
        if ROWS > 2:
            _store_row(sum2, scales, y + 2 * n_out, o, out_groups, OUT)
        if ROWS > 3:
            _store_row(sum3, scales, y + 3 * n_out, o, out_groups, OUT)

    @triton.jit
    def _store_row(total, scales, y, o, out_groups, OUT: tl.constexpr):
        scale = tl.load(scales + o, mask=o < out_groups, other=0).to(tl.float32)
        row = tl.sum(tl.sum(total, 3), 2) * scale[:, None]
        to = y + o[:, None] * OUT + tl.arange(0, OUT)[None, :]
        tl.store(to, row.to(y.dtype.element_ty), mask=(o < out_groups)[:, None])
