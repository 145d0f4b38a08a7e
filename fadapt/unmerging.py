"""The way back from a merge: within one step of the grid, or to the same bytes by the record of it.

Without a record the merged weight is dequantized, the adapters undone in float, the last one first,
and the result rounded once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.adapted import Adapted, unmerged, unmerged_bias
from fadapt.bases.grid import Gridded
from fadapt.errors import MergeError
from fadapt.formats import put
from fadapt.layer_merge import merge_layer
from fadapt.merging import named, with_layers
from fadapt.plan import Plan, check_untied, plan
from fadapt.rounding import Rounding
from fadapt.shell import join
from fadapt.undo import restore


def unmerge(
    model: nn.Module,
    params: Any,
    method: Any,
    *,
    undo: Mapping[str, Any] | None = None,
    scales: str = "auto",
) -> dict[str, Tensor]:
    """The weights of a merged model without the adapter.

    Args:
        model: what :func:`merged_model` returned; only read.
        params, method: what was merged, in the same order.
        undo: the record of that merge: the result is then the old weights bit for bit. Without it,
            they are within one step of the grid.
        scales: without ``undo``: as :func:`merge_layers`.

    Returns:
        ``{name: tensor}``, for ``functional_call(model, state, x)``.

    Raises:
        AdapterError: the adapter does not fit; DoRA without ``undo``, whose norms merging has
            divided out (or give what ``bind(...).prepare`` made on the old model); a record of
            another merge.
    """
    todo, state = _plan(model, params, method, undo)
    check_untied(model, list(todo.bases))
    for path, old in _layers(todo, undo, scales):
        layer = model.get_submodule(path)
        state |= {join(path, name): t for name, t in named(layer, old).items()}
    return state


def unmerged_model(
    model: nn.Module,
    params: Any,
    method: Any,
    *,
    undo: Mapping[str, Any] | None = None,
    scales: str = "auto",
) -> nn.Module:
    """A new model without the adapter, its layers the vendors' own: :func:`unmerge` for formats
    that hold a part of the weight outside of their tensors too (INC's scale of a whole tensor is
    a number of Python, which no state can set).

    Args:
        model, params, method, undo, scales: as :func:`unmerge`; the model is left as it is.

    Raises:
        AdapterError, MergeError: as :func:`unmerge`.
    """
    todo, beside = _plan(model, params, method, undo)
    old = _layers(todo, undo, scales)
    shell = with_layers(model, ((path, todo.bases[path], base) for path, base in old))
    for name, tensor in beside.items():
        put(shell, name, tensor)
    return shell


def _plan(model: nn.Module, params: Any, method: Any, undo: Any) -> tuple[Plan, dict[str, Tensor]]:
    """The plan, and the old biases of other modules than its layers."""
    todo = plan(model, params, method, True)
    if todo.saved:
        raise MergeError(
            f"the adapter replaces modules whole ({next(iter(todo.saved))!r}, ...): merging keeps "
            "nothing of the old ones. Take those from the model that was merged."
        )
    if todo.biases and undo is None:
        raise MergeError(
            f"the adapter trained biases ({next(iter(todo.biases))!r}, ...), and merging put them "
            "in the place of the old ones. Pass undo=, the record that merge(..., undo=True) "
            "returns, which holds those."
        )
    expected = todo.bases.keys() | todo.others.keys()
    if undo is not None and undo.keys() != expected:
        odd = sorted(undo.keys() ^ expected)
        raise MergeError(f"the undo record is of other layers: {odd[:4]} differ.")
    return todo, {join(path, "bias"): undo[path]["bias"] for path in todo.others}


def _layers(todo: Plan, undo: Mapping[str, Any] | None, scales: str) -> Iterator[tuple[str, Any]]:
    """Each layer's path, and what was under the merge."""
    for path, base in todo.bases.items():
        steps = todo.steps[path]
        if undo is None and not isinstance(base, Gridded):
            raise MergeError(
                f"layer {path!r}: its format ({type(base).__name__}) cannot be rounded to nearest, "
                "so subtracting the adapter leads nowhere near the old codes. Pass undo=, the "
                "record that merge(..., undo=True) returns."
            )
        if undo is not None:
            yield path, restore(base, steps, undo[path], path)
        else:
            merged = merge_layer(_Unmerged(base, steps), path, Rounding(), scales=scales)
            yield path, merged.base


class _Unmerged(Adapted):
    """The base under a merged one: the steps undone, last first."""

    @property
    def bias(self) -> Tensor | None:
        return unmerged_bias(self.base.bias, self.steps)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        kind = torch.promote_types(dtype or self.dtype, torch.float32)
        where = slice(self.start, self.start + self.out_features)
        return unmerged(self.base.dequantize(kind), self.steps, where).to(kind)
