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


def multiply(x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """``x W^T`` without the scales, float32 ``[n, in] -> [n, out]``."""
    books, size, out_group, in_group = codebooks.shape
    if not _has_tables(x, codes, codebooks, MOST_ROWS):
        product = x.new_empty(len(x), codes.shape[0] * out_group)
        for rows, block in _decoded(codes, codebooks):
            torch.mm(x, block.mT, out=product[:, rows])
        return product
    table = x.reshape(len(x), -1, in_group) @ codebooks.reshape(books * size, in_group).mT
    gather, numbers = _kernel("gather", codes, size)
    return torch.from_numpy(np.stack([gather(row.numpy(), numbers) for row in table.flatten(1)]))


def multiply_transposed(g: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """``g W`` without the scales, float32 ``[n, out] -> [n, in]``."""
    books, size, _, in_group = codebooks.shape
    if not _has_tables(g, codes, codebooks, MOST_ROWS_TRANSPOSED):
        total = g.new_zeros(len(g), codes.shape[1] * in_group)
        for rows, block in _decoded(codes, codebooks):
            torch.addmm(total, g[:, rows], block, out=total)
        return total
    scatter, numbers = _kernel("scatter", codes, size)
    table = np.stack([scatter(row.numpy(), numbers) for row in g.contiguous()])
    vectors = codebooks.reshape(books * size, in_group)
    return (torch.from_numpy(table).view(len(g), -1, books * size) @ vectors).view(len(g), -1)


def _has_tables(rows: Tensor, codes: Tensor, codebooks: Tensor, most: int) -> bool:
    stored = codes.is_contiguous() or codes.transpose(0, 1).is_contiguous()
    return len(rows) <= most and stored and codes.element_size() == 1 and codebooks.shape[2] == 1


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


def _kernel(name: str, codes: Tensor, size: int) -> tuple[Callable[..., Any], Any]:
    """A loop, and the codes as it takes them: uint8 ``[out, in_groups * M]`` as AQLM's files hold
    them, or ``[in_groups, out * M]`` as a layer that has run on a CPU does."""
    stored = codes.view(torch.uint8)
    if codes.is_contiguous():
        return _kernels(size)[name], stored.flatten(1).numpy()
    return _permuted_kernels(size, codes.shape[2])[name], stored.transpose(0, 1).flatten(1).numpy()


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
def _kernels(size: int) -> dict[str, Callable[..., Any]]:
    mask = size - 1

    @numba.njit(nogil=True, fastmath=True)
    def gather(table: Any, codes: Any) -> Any:
        outputs, tables = codes.shape
        whole = tables - tables % TABLES
        total = np.zeros(outputs, np.float32)
        for start in range(0, outputs, OUTPUTS):
            end = min(start + OUTPUTS, outputs)
            for first in range(0, whole, TABLES):
                part = table[first * size :]
                for i in range(start, end):
                    row = codes[i, first : first + TABLES]
                    sums = np.float32(0)
                    for j in range(TABLES):
                        sums += part[np.int32(j * size) + np.int32(row[j] & mask)]
                    total[i] += sums
            for j in range(whole, tables):
                part = table[j * size :]
                for i in range(start, end):
                    total[i] += part[codes[i, j] & mask]
        return total

    @numba.njit(nogil=True, fastmath=True)
    def scatter(g: Any, codes: Any) -> Any:
        outputs, tables = codes.shape
        table = np.zeros(tables * size, np.float32)
        for first in range(0, tables, TABLES):
            count = min(TABLES, tables - first)
            part = table[first * size :]
            for i in range(outputs):
                row = codes[i, first : first + count]
                for j in range(count):
                    part[np.int32(j * size) + np.int32(row[j] & mask)] += g[i]
        return table

    return {"gather": gather, "scatter": scatter}


@cache
def _permuted_kernels(size: int, books: int) -> dict[str, Callable[..., Any]]:
    mask = size - 1

    @numba.njit(nogil=True, fastmath=True)
    def gather(table: Any, codes: Any) -> Any:
        groups, outputs = codes.shape[0], codes.shape[1] // books
        total = np.zeros(outputs, np.float32)
        for j in range(groups):
            part = table[j * books * size :]
            row = codes[j]
            for i in range(outputs):
                for m in range(books):
                    total[i] += part[np.int32(m * size) + np.int32(row[i * books + m] & mask)]
        return total

    @numba.njit(nogil=True, fastmath=True)
    def scatter(g: Any, codes: Any) -> Any:
        groups, outputs = codes.shape[0], codes.shape[1] // books
        table = np.zeros(groups * books * size, np.float32)
        for j in range(groups):
            part = table[j * books * size :]
            row = codes[j]
            for i in range(outputs):
                for m in range(books):
                    part[np.int32(m * size) + np.int32(row[i * books + m] & mask)] += g[i]
        return table

    return {"gather": gather, "scatter": scatter}
