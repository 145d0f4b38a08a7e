"""Products with an AQLM weight on a CPU: by tables for a few rows, by decoded blocks for many.

All dot products of a group of x with the codebooks' vectors are one small GEMM; a row of W x is
then a sum of looked-up numbers. The transposed product turns that round: it adds each element of g
to the table's place that its code names, and multiplies the table by the codebooks. Of many rows it
is cheaper to decode W, a block at a time into one buffer that stays in the cache.

AQLM's own kernel (``aqlm/inference_kernels/numba_kernel.py``) is compiled once a shape, needs the
codes permuted, takes float32 alone, goes row by row, and adds into one output from all of its
threads, so that with more than one its results are wrong. These are compiled once a format, read
the codes as they are stored, run in the calling thread, and have a transposed form. The plain torch
that they must equal is ``decode`` in ``bases/aqlm_codes.py`` and a matrix product.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
except ImportError:  # it comes with aqlm[cpu], not with aqlm
    numba = None

# Rows up to which tables beat decoding W once (measured by benchmarks/aqlm_layer.py).
MOST_ROWS, MOST_ROWS_TRANSPOSED = 8, 4

TABLES = 64  # so many tables of 256 floats are worked on at a time: they fit the L2 cache
OUTPUTS = 256  # for so many outputs, whose codes fit the L1 cache
BLOCK = 2**18  # floats of W decoded at a time, at least one group of rows


def usable(rows: Tensor, codes: Tensor) -> bool:
    """Whether these loops take ``rows [n, *]``: plain float32, codes of one or two bytes."""
    return (
        numba is not None
        and type(rows) is Tensor
        and rows.dtype == torch.float32
        and len(rows) > 0
        and codes.element_size() <= 2
    )


def multiply(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``x W^T``, float32 ``[n, in] -> [n, out]``; a scale for each group of rows of W."""
    books, size, out_group, in_group = codebooks.shape
    product = torch.empty(len(x), len(codes) * out_group)
    stored = _stored(codes, codebooks) if len(x) <= MOST_ROWS else None
    if stored is None:
        for rows, block in _decoded(codes, codebooks):
            torch.mm(x, block.mT, out=product[:, rows])
        return product.mul_(_each_row(scales, out_group))
    permuted, numbers = stored
    tables = (x.view(-1, in_group) @ codebooks.reshape(-1, in_group).mT).view(len(x), -1)
    gather = _gather(size, books, permuted)
    gather(tables.numpy(), numbers, scales.numpy(), product.numpy())
    return product


def multiply_transposed(g: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``g W``, float32 ``[n, out] -> [n, in]``."""
    books, size, out_group, in_group = codebooks.shape
    g = g * _each_row(scales, out_group)
    stored = _stored(codes, codebooks) if len(g) <= MOST_ROWS_TRANSPOSED else None
    if stored is None:
        total = g.new_zeros(len(g), codes.shape[1] * in_group)
        for rows, block in _decoded(codes, codebooks):
            torch.addmm(total, g[:, rows], block, out=total)
        return total
    permuted, numbers = stored
    tables = torch.zeros(len(g), codes.shape[1] * books * size)
    _scatter(size, books, permuted)(g.numpy(), numbers, tables.numpy())
    vectors = codebooks.reshape(books * size, in_group)
    return (tables.view(-1, books * size) @ vectors).view(len(g), -1)


def _each_row(scales: Tensor, out_group: int) -> Tensor:
    return scales if out_group == 1 else scales.repeat_interleave(out_group)


def _stored(codes: Tensor, codebooks: Tensor) -> tuple[bool, Any] | None:
    """Codes of which there are tables, as the loops take them: ``[out, in_groups, M]`` as AQLM's
    files hold them, or permuted, ``[in_groups, out, M]``, as a layer that has run on a CPU does.
    None for others."""
    if codes.element_size() != 1 or codebooks.shape[2] != 1:
        return None
    if codes.is_contiguous():
        return False, codes.numpy()
    codes = codes.transpose(0, 1)
    return (True, codes.numpy()) if codes.is_contiguous() else None


def _decoded(codes: Tensor, codebooks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of W: which rows, and their values, which the next block overwrites."""
    books, size, out_group, in_group = codebooks.shape
    count, n_in = len(codes), codes.shape[1] * in_group
    step = max(1, BLOCK // (n_in * out_group))
    buffer = torch.empty(min(step, count) * out_group, n_in)
    numbers = codes.view(torch.uint8 if codes.element_size() == 1 else torch.uint16).numpy()
    flat, fill = codebooks.reshape(-1).numpy(), _fill(size, books, out_group, in_group)
    for start in range(0, count, step):
        some = numbers[start : start + step]
        fill(flat, some, buffer.numpy())
        rows = slice(start * out_group, (start + len(some)) * out_group)
        yield rows, buffer[: len(some) * out_group]


# The sizes are constants to the compiler: it then turns the inner loops into vector instructions.


@cache
def _fill(size: int, books: int, out_group: int, in_group: int) -> Callable[..., Any]:
    mask = size - 1

    @numba.njit(nogil=True)
    def fill(vectors: Any, codes: Any, weight: Any) -> None:
        for i in range(codes.shape[0]):
            for j in range(codes.shape[1]):
                for m in range(books):
                    place = (m * size + np.int64(codes[i, j, m] & mask)) * out_group * in_group
                    for r in range(out_group):
                        row = weight[i * out_group + r]
                        for k in range(in_group):
                            value = vectors[place + r * in_group + k]
                            if m == 0:
                                row[j * in_group + k] = value
                            else:
                                row[j * in_group + k] += value

    return fill  # type: ignore[no-any-return]


@cache
def _gather(size: int, books: int, permuted: bool) -> Callable[..., None]:
    """``gather(tables [n, in_groups * M * size], codes, scales [out], total [n, out])``."""
    mask = size - 1

    @numba.njit(nogil=True, fastmath=True)
    def gather(tables: Any, codes: Any, scales: Any, totals: Any) -> None:
        outputs, count = codes.shape[0], codes.shape[1] * books
        numbers = codes.reshape(outputs, count)
        whole = count - count % TABLES
        for n in range(len(tables)):
            table, total = tables[n], totals[n]
            total[:] = 0
            for start in range(0, outputs, OUTPUTS):
                end = min(start + OUTPUTS, outputs)
                for first in range(0, whole, TABLES):
                    part = table[first * size :]
                    for i in range(start, end):
                        row = numbers[i, first : first + TABLES]
                        sums = np.float32(0)
                        for j in range(TABLES):
                            sums += part[np.int32(j * size) + np.int32(row[j] & mask)]
                        total[i] += sums
                for j in range(whole, count):
                    part = table[j * size :]
                    for i in range(start, end):
                        total[i] += part[numbers[i, j] & mask]
            for i in range(outputs):
                total[i] *= scales[i]

    @numba.njit(nogil=True, fastmath=True)
    def gather_permuted(tables: Any, codes: Any, scales: Any, totals: Any) -> None:
        groups, outputs = codes.shape[0], codes.shape[1]
        numbers = codes.reshape(groups, outputs * books)
        whole = groups - groups % 4
        for n in range(len(tables)):
            table, total = tables[n], totals[n]
            total[:] = 0
            # Four groups at a time: the sums are loaded and stored a quarter as often.
            for j in range(0, whole, 4):
                part = table[j * books * size :]
                a, b, c, d = numbers[j], numbers[j + 1], numbers[j + 2], numbers[j + 3]
                for i in range(outputs):
                    sums = np.float32(0)
                    for m in range(books):
                        k = i * books + m
                        sums += part[np.int32(m * size) + np.int32(a[k] & mask)]
                        sums += part[np.int32((books + m) * size) + np.int32(b[k] & mask)]
                        sums += part[np.int32((2 * books + m) * size) + np.int32(c[k] & mask)]
                        sums += part[np.int32((3 * books + m) * size) + np.int32(d[k] & mask)]
                    total[i] += sums
            for j in range(whole, groups):
                part = table[j * books * size :]
                for i in range(outputs):
                    for m in range(books):
                        place = np.int32(m * size) + np.int32(numbers[j, i * books + m] & mask)
                        total[i] += part[place]
            for i in range(outputs):
                total[i] *= scales[i]

    return gather_permuted if permuted else gather  # type: ignore[no-any-return]


@cache
def _scatter(size: int, books: int, permuted: bool) -> Callable[..., None]:
    """``scatter(g [n, out], codes, tables [n, in_groups * M * size])``, which adds to tables."""
    mask = size - 1

    @numba.njit(nogil=True, fastmath=True)
    def scatter(gs: Any, codes: Any, tables: Any) -> None:
        outputs, count = codes.shape[0], codes.shape[1] * books
        numbers = codes.reshape(outputs, count)
        for n in range(len(gs)):
            g, table = gs[n], tables[n]
            for first in range(0, count, TABLES):
                some = min(TABLES, count - first)
                part = table[first * size :]
                for i in range(outputs):
                    row = numbers[i, first : first + some]
                    for j in range(some):
                        part[np.int32(j * size) + np.int32(row[j] & mask)] += g[i]

    @numba.njit(nogil=True, fastmath=True)
    def scatter_permuted(gs: Any, codes: Any, tables: Any) -> None:
        groups, outputs = codes.shape[0], codes.shape[1]
        numbers = codes.reshape(groups, outputs * books)
        for n in range(len(gs)):
            g, table = gs[n], tables[n]
            for j in range(groups):
                part = table[j * books * size :]
                row = numbers[j]
                for i in range(outputs):
                    for m in range(books):
                        part[np.int32(m * size) + np.int32(row[i * books + m] & mask)] += g[i]

    return scatter_permuted if permuted else scatter  # type: ignore[no-any-return]
