"""Products of small float32 matrices on a CPU, for loops that numba compiles.

A chain of such products, each a call to a library, is bound by the calls and by what they write in
between. Loops that are compiled as one keep all of it in a core's cache; they are as fast as a
library's if a tile of the result stays in vector registers. A compiler does not find that by
itself: here the tile is written in LLVM's own vectors.

Matrices are addresses in bytes, with strides in elements: nothing of numba's arrays is needed.
"""

import platform
from itertools import chain
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fadapt.kernels.openmp import inner


def _host() -> tuple[int, int]:
    """Of a vector, the floats; of a tile, the rows: two vectors of each fill the registers."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 8
    if platform.machine().lower() in ("aarch64", "arm64") or features.get("fma"):
        return 8, 4
    raise ImportError("this CPU multiplies and adds in two steps, where a library is as fast")


LANES, ROWS = _host()
_FLOAT, _BIT, _INT = ir.FloatType(), ir.IntType(1), ir.IntType(64)
_VECTOR, _MASK = ir.VectorType(_FLOAT, LANES), ir.VectorType(_BIT, LANES)


def _tile(rows: int, vectors: int, masked: bool) -> Any:
    """``C = alpha A B`` or ``C += alpha A B`` of so many rows and vectors of C; or, masked, of the
    first ``width`` columns of a vector."""

    @intrinsic
    def tile(
        _: Any, C: Any, ldc: Any, A: Any, step: Any, along: Any, B: Any, ldb: Any, k: Any,
        alpha: Any, add: Any, width: Any,
    ) -> Any:  # fmt: skip
        kinds = *(types.int64,) * 8, types.float32, types.boolean, types.int64
        signature = types.void(*kinds)

        def code(context: Any, builder: ir.IRBuilder, _: Any, args: Any) -> Any:
            C, ldc, A, step, along, B, ldb, k, alpha, add, width = args
            C, A, B = (builder.inttoptr(a, _FLOAT.as_pointer()) for a in (C, A, B))
            made = _Vectors(builder, width if masked else None)
            sums = [
                [cgutils.alloca_once_value(builder, made.zero) for _ in range(vectors)]
                for _ in range(rows)
            ]
            for place in chain(*sums):
                builder.store(made.zero, place)
            starts = [builder.gep(A, [builder.mul(_INT(r), step)]) for r in range(rows)]
            with cgutils.for_range(builder, k, intp=_INT) as loop:
                row, at = builder.mul(loop.index, ldb), builder.mul(loop.index, along)
                b = [made.load(B, builder.add(row, _INT(LANES * v))) for v in range(vectors)]
                for r in range(rows):
                    a = made.spread(builder.load(builder.gep(starts[r], [at])))
                    for v in range(vectors):
                        builder.store(made.fma(a, b[v], builder.load(sums[r][v])), sums[r][v])
            scale = made.spread(alpha)
            with builder.if_else(add) as branches:
                for branch, adds in zip(branches, (True, False), strict=True):
                    with branch:
                        for r in range(rows):
                            for v in range(vectors):
                                at = builder.add(builder.mul(_INT(r), ldc), _INT(LANES * v))
                                total = builder.load(sums[r][v])
                                if adds:
                                    total = made.fma(scale, total, made.load(C, at))
                                else:
                                    total = builder.fmul(scale, total)
                                made.store(total, C, at)
            return context.get_dummy_value()

        return signature, code

    return tile


class _Vectors:
    """Instructions on vectors, all of them or the first ``width`` elements."""

    def __init__(self, builder: ir.IRBuilder, width: Any) -> None:
        self.builder = builder
        self.zero = ir.Constant(_VECTOR, [0.0] * LANES)
        self.mask = None
        if width is not None:
            lanes = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
            self.mask = builder.icmp_signed("<", lanes, self.spread(width))

    def spread(self, number: Any) -> Any:
        kind = ir.VectorType(number.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, _INT(0))
        first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), first)

    def mixed(self, a: Any, b: Any, which: list[int]) -> Any:
        """Elements of a and b, one after the other."""
        numbers = ir.Constant(ir.VectorType(ir.IntType(32), LANES), which)
        return self.builder.shuffle_vector(a, b, numbers)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self._call(f"llvm.fma.v{LANES}f32", _VECTOR, a, b, c)

    def load(self, start: Any, at: Any) -> Any:
        place = self._place(start, at)
        if self.mask is None:
            return self.builder.load(place, align=4)
        align = ir.IntType(32)(4)
        return self._call(
            f"llvm.masked.load.v{LANES}f32.p0", _VECTOR, place, align, self.mask, self.zero
        )

    def store(self, value: Any, start: Any, at: Any) -> None:
        place = self._place(start, at)
        if self.mask is None:
            self.builder.store(value, place, align=4)
        else:
            align = ir.IntType(32)(4)
            name = f"llvm.masked.store.v{LANES}f32.p0"
            self._call(name, ir.VoidType(), value, place, align, self.mask)

    def _place(self, start: Any, at: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(start, [at]), _VECTOR.as_pointer())

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        kind = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, args)


_whole, _row = _tile(ROWS, 2, False), _tile(1, 2, False)
_narrow, _narrow_row = _tile(ROWS, 1, True), _tile(1, 1, True)


@inner
def product(
    C: int, ldc: int, A: int, step: int, along: int, B: int, ldb: int,
    m: int, n: int, k: int, alpha: float, add: bool,
) -> None:  # fmt: skip
    """``C = alpha A B``, or ``C += alpha A B``, of C ``[m, n]`` and A ``[m, k]``, whose elements
    lie ``step`` apart from row to row, ``along`` from column to column.

    The sums over k go one by one, whatever the tile: no bit of C depends on m, n, or the place.
    """
    scale, j = np.float32(alpha), 0
    while j < n:
        wide = n - j >= 2 * LANES
        i = 0
        while i < m:
            c, a, b = C + 4 * (i * ldc + j), A + 4 * i * step, B + 4 * j
            many = m - i >= ROWS
            if wide and many:
                _whole(c, ldc, a, step, along, b, ldb, k, scale, add, 0)
            elif wide:
                _row(c, ldc, a, step, along, b, ldb, k, scale, add, 0)
            elif many:
                _narrow(c, ldc, a, step, along, b, ldb, k, scale, add, n - j)
            else:
                _narrow_row(c, ldc, a, step, along, b, ldb, k, scale, add, n - j)
            i += ROWS if many else 1
        j += 2 * LANES if wide else LANES


@intrinsic
def _floats(_: Any, address: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code


@inner
def floats(address: int, count: int) -> Any:
    """The numbers at an address, as an array."""
    return numba.carray(_floats(address), (count,))


@intrinsic
def _across(_: Any, A: Any, lda: Any, C: Any, ldc: Any, scale: Any, add: Any) -> Any:
    """``C = scale A^T`` or ``C += scale A^T``, of LANES rows and columns; A may be C."""
    signature = types.void(*(types.int64,) * 4, types.float32, types.boolean)

    def code(context: Any, builder: ir.IRBuilder, _: Any, args: Any) -> Any:
        A, lda, C, ldc, scale, add = args
        A, C = (builder.inttoptr(a, _FLOAT.as_pointer()) for a in (A, C))
        made = _Vectors(builder, None)
        rows = [made.load(A, builder.mul(_INT(r), lda)) for r in range(LANES)]
        half = LANES // 2
        while half:  # in squares of 2 half rows, the quarters off the diagonal change places
            keep = [lane & half == 0 for lane in range(LANES)]
            first = [i if k else LANES + i - half for i, k in enumerate(keep)]
            second = [i + half if k else LANES + i for i, k in enumerate(keep)]
            for r in range(LANES):
                if r & half == 0:
                    a, b = rows[r], rows[r + half]
                    rows[r], rows[r + half] = made.mixed(a, b, first), made.mixed(a, b, second)
            half //= 2
        rows = [builder.fmul(row, made.spread(scale)) for row in rows]
        with builder.if_else(add) as branches:
            for branch, adds in zip(branches, (True, False), strict=True):
                with branch:
                    for r, row in enumerate(rows):
                        at = builder.mul(_INT(r), ldc)
                        made.store(builder.fadd(made.load(C, at), row) if adds else row, C, at)
        return context.get_dummy_value()

    return signature, code


@inner
def across(A: int, lda: int, C: int, ldc: int, m: int, n: int, scale: float, add: bool) -> None:
    """``C = scale A^T`` or ``C += scale A^T`` of C ``[m, n]``."""
    number = np.float32(scale)
    for i in range(0, m, LANES):
        for j in range(0, n, LANES):
            a, c = A + 4 * (j * lda + i), C + 4 * (i * ldc + j)
            if m - i >= LANES and n - j >= LANES:
                _across(a, lda, c, ldc, number, add)
                continue
            for k in range(min(LANES, m - i)):
                row = floats(c + 4 * k * ldc, n - j)
                for o in range(min(LANES, n - j)):
                    value = number * floats(a + 4 * (o * lda + k), 1)[0]
                    row[o] = row[o] + value if add else value


@inner
def symmetric(C: int, A: int, B: int, b: int, add: bool) -> None:
    """``C = A B``, or ``C += A B``, of ``[b, b]`` that lie in one piece, where that is symmetric:
    the half of it below is copied."""
    side = 2 * LANES
    for j in range(0, b, side):
        n = min(side, b - j)
        product(C + 4 * j, b, A, b, 1, B + 4 * j, b, j + n, n, b, 1.0, add)
        across(C + 4 * j, b, C + 4 * j * b, b, n, j, 1.0, False)
