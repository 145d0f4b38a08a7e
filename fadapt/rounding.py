"""From float weights to codes on a grid: what is rounded where.

``nearest``: the smallest error of each element. ``search``: nearest, on the scales that make the
summed error smallest. ``feedback``: the error of each column is carried into the columns after it,
for the smallest error of the *outputs* (:mod:`fadapt.feedback`). ``stochastic``: up or down with
probabilities that make the expected value the weight itself, so that a change far below a step
survives on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fadapt.bases.grid import Grid
from fadapt.errors import AdapterError, ConfigError
from fadapt.random import draw

ROUNDINGS = ("nearest", "search", "feedback", "stochastic")
# Of the scales that `search` tries, beside the one it starts from.
FACTORS = tuple(1 - 0.02 * k for k in range(1, 16))


@dataclass(frozen=True)
class Rounding:
    """How to round one layer.

    Args:
        kind: one of ``"nearest"``, ``"search"``, ``"feedback"``, ``"stochastic"``.
        generator: that ``"stochastic"`` draws from.
        moments: ``{path: X^T X [in, in]}`` of the layers' inputs (see :func:`fadapt.calibrate`):
            needed by ``"feedback"``; ``"search"`` weighs the columns by its diagonal.
    """

    kind: str = "nearest"
    generator: torch.Generator | None = None
    moments: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROUNDINGS:
            raise ConfigError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {self.kind!r}.")
        if self.kind == "stochastic" and self.generator is None:
            raise ConfigError(
                "rounding='stochastic' draws random numbers: pass "
                "generator=torch.Generator().manual_seed(...). The global one is never read."
            )
        if self.kind == "feedback" and self.moments is None:
            raise ConfigError(
                "rounding='feedback' weighs errors by the layers' inputs: pass moments="
                "fadapt.calibrate(model, params, method, batches)."
            )

    def moment(self, path: str, n_in: int) -> Tensor | None:
        """``X^T X`` of one layer, if it is known."""
        if self.moments is None:
            return None
        found = self.moments.get(path)
        if found is None or tuple(found.shape) != (n_in, n_in):
            came = "nothing" if found is None else f"shape {list(found.shape)}"
            raise AdapterError(
                f"moments: layer {path!r} needs X^T X of shape [{n_in}, {n_in}], got {came}. "
                "fadapt.calibrate makes them."
            )
        return found


def stochastic(grid: Grid, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Codes of ``weight`` ``[rows, in]``, each of the two next to it with the right probability."""
    levels = grid.levels(weight)
    codes = grid.cast(levels.clone())
    other = grid.beside(codes, levels)
    here, there = codes.to(levels.dtype), other.to(levels.dtype)
    share = (levels - here) / torch.where(there == here, 1.0, there - here)
    # What lies on the grid stays, whatever the division's rounding says.
    share = torch.where(share.abs() < 1e-5, 0.0, share)
    moved = draw(tuple(weight.shape), generator, "uniform").to(weight.device) < share
    if codes.dtype.is_floating_point:
        return torch.where(moved, there, here).to(codes.dtype)
    return torch.where(moved, other, codes)


def search_errors(grid: Grid, weight: Tensor, moment: Tensor | None) -> Tensor:
    """The summed squared error of nearest rounding in each block, shaped as the grid's scale."""
    error = (grid.values(grid.nearest(weight), weight.dtype) - weight).square_()
    if moment is not None:
        error *= moment.diagonal().to(error.dtype)
    return grid.sums(error)
