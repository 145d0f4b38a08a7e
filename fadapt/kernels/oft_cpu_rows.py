"""OFT on a CPU: ``x R`` and ``x^T g`` of many adapters without a copy of x in another order; and
``x R`` from R's vectors, a few blocks at a time in buffers that stay in the cache.

The plain torch that they must equal is that of ``oft_ops.py``, and of ``cayley.py``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fadapt.bases.precision import gemm_dtype
from fadapt.cayley import size_of
from fadapt.kernels import oft_cpu
from fadapt.kernels.oft_ops import Coefficients, apart, ops, series_of


def _rotated(x: Tensor, R: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    kind = gemm_dtype(R)
    R = R.to(kind)
    rows, turned = (_by_blocks(t, R.shape[:-3], *R.shape[-3:-1]) for t in (x, y))
    if R.dim() == 3:
        turned.copy_(torch.bmm(rows.to(kind), R))
        return y
    buffer = torch.empty(rows.shape[1:], dtype=kind, device="cpu")
    for a, b, c in zip(rows, R, turned, strict=True):
        c.copy_(torch.bmm(a.to(kind), b, out=buffer))
    return y


def _products(x: Tensor, g: Tensor, size: int, k: int) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    lead = (k,) if k else ()
    a, b = (apart(t.to(kind), size, lead) for t in (x, g))
    if not k:
        return torch.bmm(a.mT, b)
    out = a.new_empty(k, x.shape[-1] // size, size, size)
    for p, q, o in zip(a.mT, b, out, strict=True):
        torch.bmm(p, q, out=o)
    return out


def _by_blocks(x: Tensor, lead: Sequence[int], r: int, size: int) -> Tensor:
    """x as R's blocks take it; a block that all share takes all of a row as so many rows."""
    return x.reshape(*lead, -1, r, size).transpose(-2, -3)


rotate, outer = ops(_rotated, _products)


def takes(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> bool:
    """Whether :func:`turned` gains anything: of many rows, products of blocks are the cheaper."""
    size = size_of(vectors.shape[-1])
    rows, most = x.numel() // (size * vectors.shape[:-1].numel()), size * (1 if coefficients else 2)
    wide = x.dtype in (torch.float32, torch.float64)
    return wide and x.dtype == vectors.dtype and 0 < rows <= most


def turned(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor | None]:
    """``x R`` of R's vectors ``[r, m]`` or ``[k, r, m]``; and R, of the exact form."""
    size = size_of(vectors.shape[-1])
    y = x.new_empty(x.shape)
    rows, into = (_each(t, vectors, size) for t in (x, y))
    of = vectors.reshape(*rows.shape[:2], -1)
    kept = vectors.new_empty(*rows.shape[:2], size, size) if coefficients is None else None
    for part, (a, out), (built, *spare) in _parts(rows, 2, 7):
        R = built if kept is None else kept[part].flatten(0, 1)
        oft_cpu.build_into(of[part].flatten(0, 1), coefficients, spare, R)
        taken = rows[part]
        torch.bmm(_copied(taken, a), R, out=out)
        into[part] = out.view(taken.shape)
    return y, None if kept is None else kept.view(*vectors.shape[:-1], size, size)


def turned_back(
    x: Tensor,
    vectors: Tensor,
    R: Tensor | None,
    g: Tensor,
    coefficients: Coefficients,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of :func:`turned` with respect to x, if it needs one, and to the vectors.

    Of the exact form, ``dR = -(R + I) dQ (R + I) / 2``, so that Q's gradient is
    ``-(x + y)^T (g + dx) / 2`` of y = x R and dx = g R^T: a product with rows for two of blocks.
    """
    size = size_of(vectors.shape[-1])
    dx = x.new_empty(x.shape) if needs_x else None
    dv = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    rows, back = (_each(t, vectors, size) for t in (x, g))
    into = None if dx is None else _each(dx, vectors, size)
    of, dof = (t.reshape(*rows.shape[:2], -1) for t in (vectors, dv))
    kept = None if R is None else R.reshape(*of.shape[:2], size, size)
    for part, (a, b, d, *spare), (Q, E) in _parts(rows, 5 + len(coefficients or ()), 2):
        a, b = _copied(rows[part], a), _copied(back[part], b)
        if kept is None:
            oft_cpu.skew_into(of[part].flatten(0, 1), Q)
            _series_back(a, b, Q, coefficients, spare, E, d if needs_x else None)
        else:
            turn = kept[part].flatten(0, 1)
            torch.bmm(b, turn.mT, out=d)
            y = spare[0].copy_(a).baddbmm_(a, turn)
            E.baddbmm_(y.mT, b.add_(d), beta=0, alpha=-0.5)
        if into is not None:
            into[part] = d.view(into[part].shape)
        oft_cpu.fold_into(E, dof[part].flatten(0, 1), Q)
    return dx, dv


def _series_back(
    x: Tensor,
    g: Tensor,
    Q: Tensor,
    coefficients: Coefficients,
    spare: Sequence[Tensor],
    E: Tensor,
    dx: Tensor | None,
) -> None:
    """The gradients of ``x R``, ``R = I + 2 sum_(k < n) M^k + last M^n`` of ``M = sign Q``, by
    products with rows alone: that of Q, as if it were any matrix, into E.

    With ``g_j = g (M^T)^j`` and ``W_m = g_0 + ... + g_(m - 1) + last / 2 g_m``, that of x is
    ``2 W_n - g``, and that of M ``2 sum_i (x M^i)^T W_(n - 1 - i)``.
    """
    form = series_of(coefficients)
    assert form is not None
    sign, last, degree = form
    one, two, total, *room = spare
    sums = [g]
    power, turn, before = g, 1.0, g
    for m in range(1, degree + (dx is not None)):
        power, turn = torch.bmm(power, Q, out=(one, two)[m % 2]), -sign * turn  # Q^T is -Q
        sums.append(torch.add(before, power, alpha=turn * last / 2, out=room[m - 1]))
        before = sums[m] if last == 2 else torch.add(before, power, alpha=turn, out=total)
    if dx is not None:
        torch.lerp(g, sums[degree], 2.0, out=dx)
    power = x
    for i in range(degree):
        scale = sign ** (i + 1) * (last if i == degree - 1 else 2.0)
        E.baddbmm_(power.mT, sums[degree - 1 - i], beta=float(i > 0), alpha=scale)
        if i < degree - 1:
            power = torch.bmm(power, Q, out=(one, two)[i % 2])


def _each(x: Tensor, vectors: Tensor, size: int) -> Tensor:
    """x as ``[k, r, t, b]``."""
    return _by_blocks(x, vectors.shape[:-2] or (1,), vectors.shape[-2], size)


def _copied(rows: Tensor, into: Tensor) -> Tensor:
    into.view(rows.shape).copy_(rows)
    return into


def _parts(
    rows: Tensor, of_rows: int, of_blocks: int
) -> Iterator[tuple[tuple[slice, slice], Sequence[Tensor], Sequence[Tensor]]]:
    """Some of ``rows [k, r, t, b]`` at a time, of several adapters or of a part of one's blocks, so
    that threads have enough to do; and buffers, ``[n, t, b]`` and ``[n, b, b]``."""
    k, r, t, size = rows.shape
    many = max(1, oft_cpu.CHUNK_BYTES // (t * size * rows.element_size()))
    adapters, blocks = max(1, min(k, many // r)), min(r, many)
    flat = rows.new_empty(of_rows, adapters * blocks, t, size)
    square = rows.new_empty(of_blocks, adapters * blocks, size, size)
    for i in range(0, k, adapters):
        for j in range(0, r, blocks):
            n = min(adapters, k - i) * min(blocks, r - j)
            part = slice(i, i + adapters), slice(j, j + blocks)
            yield part, flat[:, :n].unbind(), square[:, :n].unbind()
