"""One layer: the merged weight, rounded to a format, a block of rows at a time.

What is held beyond the output is a few blocks in float32, never W whole.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt.adapted import Adapted, row_blocks
from fadapt.bases.grid import Grid, Gridded
from fadapt.bases.precision import without_autocast
from fadapt.errors import MergeError
from fadapt.feedback import factored, feedback
from fadapt.rounding import FACTORS, Rounding, search_errors, stochastic


class Merged(NamedTuple):
    """One layer, merged.

    Attributes:
        base: of the target's format.
        saturated: elements that lay beyond the ends of their grid.
        kept: the share of the scales that are the target's own; 1.0 where there are none.
    """

    base: Any
    saturated: int = 0
    kept: float = 1.0


def merge_layer(
    adapted: Adapted,
    path: str,
    rounding: Rounding,
    *,
    like: Any = None,
    scales: str = "auto",
    safe: bool = True,
) -> Merged:
    """The merged weight of ``adapted`` in the format of ``like``; its own base's, if that is None.

    Args:
        adapted: a base and its adapters.
        path: of the layer, for messages.
        rounding: how.
        like: a base of the wanted format and shape; its bias and contents do not matter.
        scales: see :meth:`fadapt.bases.grid.Grid.choose`.
        safe: check that the result is finite.

    Raises:
        MergeError: with ``safe``, NaN or Inf in the result.
    """
    like = adapted.base if like is None else like
    if not isinstance(like, Gridded):
        raise MergeError(
            f"layer {path!r}: a {type(like).__name__} has no grid to round to; name another "
            "format with to=."
        )
    whole, moment = like.grid(), rounding.moment(path, adapted.in_features)
    # Rounding to nearest holds the fewest blocks: larger ones cost as little, and run faster.
    limit = 2**19 if rounding.kind == "nearest" else 2**18
    blocks, shared = list(row_blocks(adapted, limit)), None
    if whole.tall and whole.span is not None:
        shared = _shared(adapted, path, like, blocks, rounding, moment, scales, safe)
    scale, zero = whole.scale.clone(), None if whole.zero is None else whole.zero.clone()
    codes = torch.empty_like(like.codes())
    saturated = 0
    for rows, weight in _weights(adapted, blocks):
        grid = shared or _at(whole, rows)
        low, high = grid.extent(weight)
        if shared is None:
            _check_finite(low, high, rows, path, safe)
            grid = grid.choose(low, high, scales)
            if rounding.kind == "search" and grid.span is not None:
                grid = _searched([weight], grid, moment)
            if not grid.tall:
                scale[rows] = grid.scale
                if zero is not None and grid.zero is not None:
                    zero[rows] = grid.zero
        if not grid.holds(low, high):  # whose ends say it, where all fits
            saturated += grid.saturated(weight)
        if rounding.kind == "stochastic" and rounding.generator is not None:
            codes[rows] = stochastic(grid, weight, rounding.generator)
        else:
            codes[rows] = grid.nearest(weight)
        if safe and grid.span is None:
            _check_fits(codes[rows], weight, path)
    if shared is not None:
        scale, zero = shared.scale, shared.zero
    grid = replace(whole, scale=scale, zero=zero)
    if rounding.kind == "feedback" and moment is not None:
        _feed_back(adapted, path, grid, moment, codes, safe)
    kept = float((scale == whole.scale).float().mean())
    base = like.on_grid(grid, codes)
    return Merged(with_bias(base, adapted.bias), saturated, kept)


def with_bias(base: Any, bias: Tensor | None) -> Any:
    """``base`` with this bias, in its own bias's dtype; its other tensors are shared."""
    if bias is None or bias is base.bias:
        return base if bias is base.bias else replace(base, bias=None)
    return replace(base, bias=bias.to(base.dtype if base.bias is None else base.bias.dtype))


def _weights(adapted: Adapted, blocks: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    for rows in blocks:
        yield rows, adapted.rows(rows).dequantize()


def _feed_back(
    adapted: Adapted, path: str, grid: Grid, moment: Tensor, codes: Tensor, safe: bool
) -> None:
    """Write the codes that feedback finds on ``grid``."""
    kind = torch.promote_types(adapted.dtype, torch.float32)
    # It walks over the columns of each block: larger blocks, fewer walks.
    blocks = list(row_blocks(adapted, 3 * 2**20))
    held = torch.empty(
        blocks[0].stop, adapted.in_features, dtype=kind, device=adapted.device
    )  # one for all of them: a new one would be made while the old is there
    with without_autocast(held), factored(moment, kind, adapted.device, path) as factor:
        for rows in blocks:
            part = adapted.rows(rows)
            weight = held[: part.out_features]
            for some, values in _weights(part, list(row_blocks(part))):
                weight[some] = values
            feedback(_at(grid, rows), weight, factor, codes[rows])
            if safe and grid.span is None:
                _check_fits(codes[rows], weight, path)


def _shared(
    adapted: Adapted,
    path: str,
    like: Any,
    blocks: list[slice],
    rounding: Rounding,
    moment: Tensor | None,
    scales: str,
    safe: bool,
) -> Grid:
    """The grid of a format with one scale for all rows, which a pass over them chooses."""
    grid: Grid = like.grid()
    # In place: a small result kept from each block would lie between the large ones of the heap,
    # and the allocator could not put the next block where the one before was.
    kind = torch.promote_types(adapted.dtype, torch.float32)
    low = torch.full(grid.scale.shape, math.inf, dtype=kind, device=adapted.device)
    high = -low
    for rows, weight in _weights(adapted, blocks):
        least, most = grid.extent(weight)
        _check_finite(least, most, rows, path, safe)
        torch.minimum(low, least, out=low)
        torch.maximum(high, most, out=high)
    grid = grid.choose(low, high, scales)
    if rounding.kind != "search":
        return grid
    return _searched((w for _, w in _weights(adapted, blocks)), grid, moment)


def _searched(weights: Any, grid: Grid, moment: Tensor | None) -> Grid:
    """Each block's best scale: of the one it has, and that times each of FACTORS."""
    candidates = [grid, *(grid.shrunk(f) for f in FACTORS)]
    errors: list[Tensor] = []
    for weight in weights:
        if not errors:
            errors = [torch.zeros_like(grid.scale, dtype=weight.dtype) for _ in candidates]
        for total, one in zip(errors, candidates, strict=True):
            total += search_errors(one, weight, moment)
    best, chosen = errors[0], grid
    for error, one in zip(errors[1:], candidates[1:], strict=True):
        better = error < best
        best, chosen = torch.where(better, error, best), chosen.picked(better, one)
    return chosen


def _at(grid: Grid, rows: slice) -> Grid:
    if grid.tall:
        return grid
    zero = None if grid.zero is None else grid.zero[rows]
    return replace(grid, scale=grid.scale[rows], zero=zero)


def _check_finite(low: Tensor, high: Tensor, rows: slice, path: str, safe: bool) -> None:
    if safe and not bool(low.isfinite().all() and high.isfinite().all()):
        raise not_finite(path, f" (first seen from row {rows.start} on)")


def _check_fits(codes: Tensor, weight: Tensor, path: str) -> None:
    if not bool(codes.isfinite().all()):
        raise MergeError(
            f"layer {path!r}: the merged weight overflows {codes.dtype}: its largest element is "
            f"{weight.abs().max():.3g}. Merge into a wider format (to='float32'), or find out what "
            "made the adapter so large."
        )


def not_finite(path: str, where: str = "") -> MergeError:
    """The error for a merged weight of NaN or Inf."""
    return MergeError(
        f"layer {path!r}: the merged weight holds NaN or Inf{where}. Nothing was written. Look at "
        "the adapter and at the base; safe=False merges all the same."
    )
