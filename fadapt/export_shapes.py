"""The shape and the dtype of each input of an exported graph: kept in its manifest, and checked
before a run, as an AOTInductor package looks at neither, and torch's own guards name no input."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from fadapt.errors import AdapterError
from fadapt.export_graph import LARGEST, PAST, Axes, rank_axis


def shapes_of(inputs: Mapping[str, Tensor], dynamic: Axes, params: Any) -> dict[str, list[Any]]:
    """``{name: [dtype, *sizes]}`` of the ids, the model's inputs and the bank's leaves; of a
    dynamic axis its name.

    Args:
        inputs, dynamic: as :func:`fadapt.export` takes them.
        params: the bank; None if it is baked in.
    """
    found: dict[str, list[Any]] = {"ids": ["int64", "batch"]}
    for name, tensor in inputs.items():
        axes = dynamic.get(name, {})
        sizes = [axes.get(k, size) for k, size in enumerate(tensor.shape)]
        found[name] = [_name(tensor), *sizes]
    leaves = [] if params is None else tree_flatten_with_path(params)[0]
    ranks: dict[str, str] = {}
    for k, (key, leaf) in enumerate(leaves):
        sizes = list(leaf.shape)
        first: Any = key[0]  # the kind, of a tuple of stacks
        sizes[0] = f"adapters_{first.idx}" if isinstance(params, tuple) else "adapters"
        if (axis := rank_axis(key)) is not None:
            sizes[axis] = ranks.setdefault(keystr(key[:-1]), f"rank_{len(ranks)}")
        found[f"bank_{k}"] = [_name(leaf), *sizes]
    return found


def check_shapes(
    given: Mapping[str, Tensor], expected: Mapping[str, list[Any]], graph: str
) -> None:
    """Raise AdapterError unless these inputs, by name, are what the graph takes.

    Args:
        given: all that share axes.
        expected: what :func:`shapes_of` returned.
        graph: its name, for the message.
    """
    sizes: dict[str, int] = {}
    for name in sorted(given, key=lambda name: any("+" in str(a) for a in expected[name])):
        (kind, *axes), tensor = expected[name], given[name]
        fits = _name(tensor) == kind and tensor.dim() == len(axes)
        for axis, size in zip(axes, tensor.shape, strict=False):
            known = _known(axis, sizes)
            least = 0 if axis == PAST else 1
            fits = fits and (size == known if known is not None else least <= size <= LARGEST)
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
        if not fits:
            here = {axis: _known(axis, sizes) for axis in axes if isinstance(axis, str)}
            raise AdapterError(
                f"{graph} takes {name} as {kind} [{', '.join(map(str, axes))}]; got "
                f"{_name(tensor)} {list(tensor.shape)}, where {here}. An axis of one name has one "
                "size in all inputs, and the ids are one a row of the batch."
            )


def _known(axis: Any, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis: a number, a name, or a sum of names (``"past + sequence"``)."""
    if not isinstance(axis, str):
        return int(axis)
    parts = [axis] if axis in sizes else axis.split(" + ")
    return sum(sizes[p] for p in parts) if all(p in sizes for p in parts) else None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
