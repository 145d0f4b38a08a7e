"""What a format's grid is: the numbers that a block of W can hold, whatever the format.

A grid is a scale (and a zero point) a block, and codes: integers, or small floats. What rounds, and
what chooses scales, needs no more than that; so each is written once, for every format.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fadapt.errors import AdapterError, ConfigError

SCALES = ("auto", "keep", "fresh")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Grid:
    """``W = (codes - zero) * scale``, one scale a block of columns of a row (or of all rows).

    Attributes:
        scale: ``[rows, groups]``, with 1 for either where one scale spans it.
        zero: like ``scale``, or None for all zeros. Integers, unless the format's are not.
        kind: the dtype of the codes: an integer, or a float.
        low, high: the smallest and the largest code.
        span: a fresh symmetric scale is ``amax / span``. None: there are no scales to choose.
    """

    scale: Tensor
    zero: Tensor | None
    kind: torch.dtype
    low: float
    high: float
    span: float | None

    @property
    def tall(self) -> bool:
        """One scale may span several rows: it cannot be chosen by some of them."""
        return self.scale.shape[0] == 1

    def levels(self, weight: Tensor) -> Tensor:
        """W in units of the grid, unrounded and unbounded: ``[rows, in]``."""
        blocks = self._blocks(weight) / self.scale.unsqueeze(-1)
        if self.zero is not None:
            blocks = blocks + self.zero.unsqueeze(-1)
        return blocks.reshape(weight.shape)

    def cast(self, levels: Tensor) -> Tensor:
        """Levels as codes: rounded to nearest, clamped to the range. What :meth:`levels` gives is
        scratch: it is rounded in place."""
        if not self.kind.is_floating_point:
            return levels.round_().clamp_(self.low, self.high).to(self.kind)
        return (
            levels.clamp_(self.low, self.high).to(self.kind) if self.span else levels.to(self.kind)
        )

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes closest to ``weight``."""
        return self.cast(self.levels(weight))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, in ``dtype``."""
        blocks = self._blocks(codes.to(dtype))
        if self.zero is not None:
            blocks = blocks - self.zero.unsqueeze(-1).to(dtype)
        return (blocks * self.scale.unsqueeze(-1).to(dtype)).reshape(codes.shape)

    def beside(self, codes: Tensor, levels: Tensor) -> Tensor:
        """The codes next to ``codes`` on the side where ``levels`` lie."""
        at = codes.to(levels.dtype)
        if not self.kind.is_floating_point:
            step = torch.where(levels > at, 1, -1)
            return (codes.to(torch.int32) + step).clamp(self.low, self.high).to(self.kind)
        # The bits of a float, less its sign, are in the order of its magnitude.
        bits = codes.view(_INTEGERS[self.kind.itemsize])
        away = torch.where(at == 0, levels > 0, (levels > at) == (at > 0))
        tiniest = torch.where(levels > 0, 1, 1 + torch.iinfo(bits.dtype).min).to(bits.dtype)
        moved = torch.where(at == 0, tiniest, bits + torch.where(away, 1, -1).to(bits.dtype))
        found = moved.view(self.kind)
        inside = found.to(levels.dtype).abs() <= self.high
        return torch.where(inside, moved, bits).view(self.kind)

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest element of each block, shaped as ``scale``."""
        blocks = self._blocks(weight)
        return blocks.amin(-1), blocks.amax(-1)

    def choose(self, smallest: Tensor, largest: Tensor, scales: str) -> "Grid":
        """The grid for blocks of this extent.

        Args:
            smallest, largest: of each block, shaped as ``scale``.
            scales: ``"keep"`` this grid's own; ``"fresh"``, as the format computes them;
                ``"auto"``, fresh ones where a block does not fit into its own, else kept. A fresh
                scale of few bits is then rounded up: 127.5 steps of one rounded down would fall
                short of the block's end. And with zero points it spans the old range as well as
                the new: else a merge and its inverse would each move the range, and never settle.
        """
        if scales not in SCALES:
            raise ConfigError(f"scales must be one of {', '.join(SCALES)}; got {scales!r}.")
        if scales == "keep" or self.span is None:
            return self
        ends = (smallest, largest)
        if scales == "auto" and self.zero is not None:
            step, at = self.scale.to(smallest.dtype), self.zero.to(smallest.dtype)
            ends = (
                torch.minimum(smallest, (self.low - at) * step),
                torch.maximum(largest, (self.high - at) * step),
            )
        scale, zero = self._fresh(*ends, covering=scales == "auto")
        if scales == "auto":
            fits = self._fits(smallest) & self._fits(largest)
            scale = torch.where(fits, self.scale, scale)
            zero = None if zero is None or self.zero is None else torch.where(fits, self.zero, zero)
        return replace(self, scale=scale, zero=zero)

    def shrunk(self, factor: float) -> "Grid":
        """The grid with every scale times ``factor``."""
        return replace(self, scale=(self.scale * factor).to(self.scale.dtype))

    def picked(self, where: Tensor, other: "Grid") -> "Grid":
        """``other``'s blocks where the mask, shaped as ``scale``, is true; else this one's."""
        zero = self.zero
        if zero is not None and other.zero is not None:
            zero = torch.where(where, other.zero, zero)
        return replace(self, scale=torch.where(where, other.scale, self.scale), zero=zero)

    def holds(self, smallest: Tensor, largest: Tensor) -> bool:
        """Whether blocks of this extent lie within the grid's ends, up to rounding."""
        return self.span is None or bool((self._fits(smallest) & self._fits(largest)).all())

    def saturated(self, weight: Tensor) -> int:
        """How many elements lie beyond the grid's ends, by more than rounding."""
        if self.span is None:
            return 0
        return int((~self._inside(self.levels(weight))).sum())

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each block, shaped as ``scale``."""
        return self._blocks(values).sum(-1)

    def columns(self, which: slice, n_in: int) -> "Grid":
        """The grid of some of ``n_in`` columns, one scale a column where groups differ."""
        if self.scale.shape[1] == 1:
            return self
        index = torch.arange(n_in, device=self.scale.device)[which] // (n_in // self.scale.shape[1])
        zero = None if self.zero is None else self.zero[:, index]
        return replace(self, scale=self.scale[:, index], zero=zero)

    def _blocks(self, values: Tensor) -> Tensor:
        if self.tall and values.shape[0] != 1:
            return values.reshape(1, 1, -1)
        return values.reshape(*self.scale.shape, -1)

    def _inside(self, levels: Tensor) -> Tensor:
        if self.kind.is_floating_point:
            # What rounds to the last code: a W that was rounded to bfloat16 may lie beyond it.
            half = 2.0 ** math.floor(math.log2(self.high)) * torch.finfo(self.kind).eps / 2
            return levels.abs() < self.high + half
        # Half a step beyond an end included, where a fresh symmetric scale puts the largest, but
        # for float32's rounding of the scale and of the quotient.
        half = 0.5 + 4 * torch.finfo(torch.float32).eps * (self.high - self.low)
        return (levels >= self.low - half) & (levels <= self.high + half)

    def _fits(self, reach: Tensor) -> Tensor:
        levels = reach / self.scale
        return self._inside(levels if self.zero is None else levels + self.zero)

    def _fresh(
        self, smallest: Tensor, largest: Tensor, covering: bool
    ) -> tuple[Tensor, Tensor | None]:
        least = torch.finfo(torch.float32).eps  # torchao's floor for a scale, whatever the dtype
        about = torch.finfo(self.scale.dtype)

        def rounded(exact: Tensor) -> Tensor:
            exact = exact.clamp(min=least)
            scale = exact.to(self.scale.dtype)
            if not covering:
                return scale
            up = exact + about.eps * exact.clamp(min=about.tiny)
            return torch.where(scale < exact, up.to(scale.dtype), scale)

        if self.zero is None:
            assert self.span is not None
            return rounded(torch.maximum(-smallest, largest) / self.span), None
        if self.zero.is_floating_point():  # any offset, itself of the scale's dtype
            scale = rounded((largest - smallest) / (self.high - self.low))
            offset = (smallest - self.low * scale).to(scale.dtype)
            return scale, -offset.to(self.zero.dtype) / scale.to(self.zero.dtype)
        bottom, top = smallest.clamp(max=0), largest.clamp(min=0)
        scale = rounded((top - bottom) / (self.high - self.low))
        zero = (self.low - (bottom / scale).round()).clamp(self.low, self.high)
        return scale, zero.to(self.zero.dtype)


@runtime_checkable
class Gridded(Protocol):
    """A base whose weight lies on a grid."""

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        ...

    def grid(self) -> Grid:
        """The grid, sharing the base's tensors."""
        ...

    def codes(self) -> Tensor:
        """``[out, in]``, in the grid's kind."""
        ...

    def on_grid(self, grid: Grid, codes: Tensor) -> Any:
        """The base with other codes, on a grid of the same kind."""
        ...


def requantize(base: Any, weight: Tensor, scales: str) -> Any:
    """``weight`` ``[out, in]`` as a base like ``base``, rounded to nearest.

    The ``requantize`` of every format that lies on a grid; see :meth:`Grid.choose`.

    Raises:
        AdapterError: a weight that is not finite, which no code stands for.
    """
    grid: Grid = base.grid()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    ends = grid.extent(wide)
    if not all(bool(end.isfinite().all()) for end in ends):
        raise AdapterError(
            f"the weight {list(weight.shape)} to requantize holds "
            f"{int((~weight.isfinite()).sum())} NaN or Inf, for which {type(base).__name__} has no "
            "code. Look where they come from: an adapter that diverged, most often."
        )
    grid = grid.choose(*ends, scales)
    return base.on_grid(grid, grid.nearest(wide))
