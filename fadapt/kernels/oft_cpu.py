"""What a CPU has for OFT: compiled loops, where numba is installed; and when ``x R`` is better had
straight from R's vectors.

The plain torch that they must equal, and that serves elsewhere, is that of ``cayley.py`` and of
``oft_ops.py``.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fadapt.bases.precision import gemm_dtype
from fadapt.cayley import size_of
from fadapt.kernels.oft_fused import fused
from fadapt.kernels.oft_ops import Coefficients, fits, ops, series_of

MOST = 256  # of a block, for the loops: larger ones fill a core's cache


def loops(size: int, *tensors: Tensor) -> Any:
    """The compiled loops, where they take these, of blocks of that size; or None."""
    for t in tensors:
        if t.dtype != torch.float32 or not t.is_cpu or not t.numel():
            return None
    return _loops() if size <= MOST else None


@cache
def _loops() -> Any:
    try:
        from fadapt.kernels import oft_loops
    except (ImportError, OSError, AttributeError, TypeError):  # no numba, or no OpenMP in torch
        return None
    return oft_loops


def _rotated(x: Tensor, R: Tensor) -> Tensor | None:
    found = loops(R.shape[-1], x, R)
    if found is not None:
        return found.rotated(x, R)  # type: ignore[no-any-return]
    kind = gemm_dtype(R)
    found = loops(R.shape[-1], wide := x.to(kind), R := R.to(kind))
    return None if found is None else found.rotated(wide, R).to(x.dtype)


def _products(x: Tensor, g: Tensor, size: int, k: int) -> Tensor | None:
    kind = torch.promote_types(x.dtype, torch.float32)
    found = loops(size, x := x.to(kind), g := g.to(kind))
    return None if found is None else found.products(x, g, size, k)


def _both(x: Tensor, R: Tensor, g: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor] | None:
    found = loops(R.shape[-1], x, R, g)
    return None if found is None else found.rotated_back(x, R, g, needs_x)


rotate, outer = ops(_rotated, _products, _both)


def turns(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> bool:
    """Whether ``x R`` straight from the vectors gains anything: of many rows, products of blocks
    are the cheaper."""
    size = size_of(vectors.shape[-1])
    rows, most = x.numel() // (size * vectors.shape[:-1].numel()), size * (1 if coefficients else 2)
    known = series_of(coefficients) is not None and fits(x, vectors.shape[-2], size)
    return rows <= most and known and loops(size, x, vectors) is not None


def _turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor | None]:
    found = loops(size_of(vectors.shape[-1]), x, vectors)
    return found.turned(x, vectors, coefficients)  # type: ignore[no-any-return]


def _turned_back(x: Tensor, vectors: Tensor, *others: Any) -> tuple[Tensor | None, Tensor]:
    found = loops(size_of(vectors.shape[-1]), x, vectors)
    return found.turned_back(x, vectors, *others)  # type: ignore[no-any-return]


turned = fused(_turned, _turned_back, turns, rotate, outer)
