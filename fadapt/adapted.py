"""A base under adapters, one after the other, as a base whose weight is the merged one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt.bases.precision import without_autocast
from fadapt.method import to_merge


class Step(NamedTuple):
    """One adapter of one layer: the method as it stands there, and what it prepared."""

    method: Any
    params: Any


@dataclass(frozen=True)
class Adapted:
    """``W`` with ``steps`` merged into it, computed where it is asked for, by rows.

    It has what a method reads of a base, so that the second adapter of a layer can be prepared on
    the weight that the first one made.

    Attributes:
        base: the frozen layer, some rows of it.
        steps: in the order in which they are merged.
        start: which row of the whole layer is ``base``'s first.
        trained: a bias ``[out]`` in place of the base's own; None if there is none.
    """

    base: Any
    steps: tuple[Step, ...] = ()
    start: int = 0
    trained: Tensor | None = None

    @property
    def in_features(self) -> int:
        """As the base's."""
        return self.base.in_features  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int:
        """As the base's."""
        return self.base.out_features  # type: ignore[no-any-return]

    @property
    def patch(self) -> torch.Size:
        """As a convolution's."""
        return self.base.patch  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """As the base's."""
        return self.base.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """As the base's."""
        return self.base.device  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, the steps' own added; or None."""
        bias: Tensor | None = self.base.bias if self.trained is None else self.trained
        for method, params in self.steps:
            bias = method.merge_bias(bias, params)
        return bias

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The merged rows ``[rows, in]``, in float32 at least, whatever autocast."""
        kind = torch.promote_types(dtype or self.dtype, torch.float32)
        weight: Tensor = self.base.dequantize(kind)
        where = slice(self.start, self.start + self.out_features)
        return with_steps(weight, self.steps, where).to(kind)

    def rows(self, rows: slice) -> "Adapted":
        """Some of the rows."""
        start, _, _ = rows.indices(self.out_features)
        bias = None if self.trained is None else self.trained[rows]
        return replace(self, base=self.base.rows(rows), start=self.start + start, trained=bias)

    def then(self, method: Any, params: Any, path: str) -> "Adapted":
        """With one more adapter, checked and prepared on the weight so far."""
        base: Any = self
        method.check(base, params, path)
        ready = to_merge(method, {path: params}, {path: base})[path]
        return replace(self, steps=(*self.steps, Step(method, ready)))


def with_steps(weight: Tensor, steps: Sequence[Step], rows: slice = slice(None)) -> Tensor:
    """Rows of the merged weight from the same rows of W, whatever autocast."""
    with without_autocast(weight):
        for method, params in steps:
            weight = method.merge(weight, params, rows)
    return weight


def unmerged(weight: Tensor, steps: Sequence[Step], rows: slice) -> Tensor:
    """Rows of W from the same rows of the merged weight: each step undone, the last one first."""
    with without_autocast(weight):
        for method, params in reversed(steps):
            weight = method.unmerge(weight, params, rows)
    return weight


def unmerged_bias(bias: Tensor | None, steps: Sequence[Step]) -> Tensor | None:
    """The same for the bias."""
    for method, params in reversed(steps):
        bias = method.unmerge_bias(bias, params)
    return bias


def row_blocks(base: Any, limit: int = 2**18) -> Iterator[slice]:
    """Slices of output rows of at most ``limit`` float32 bytes, in whole groups of rows."""
    group = getattr(base, "out_group_size", 1)
    count = max(1, limit // (4 * base.in_features * group)) * group
    for start in range(0, base.out_features, count):
        yield slice(start, min(start + count, base.out_features))
