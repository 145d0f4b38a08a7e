"""What each layer of a model is to fadapt: its base, its format, and what can be done with it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fadapt.bases import Base, Dense, base_of, is_supported
from fadapt.errors import UnsupportedLayerError


class Description(NamedTuple):
    """One layer that adapters can go on, or that looks as if.

    Attributes:
        path: of the layer.
        kind: the class of its base; of the layer itself where it has none.
        shape: ``(out_features, in_features)``.
        dtypes: of the stored weight, and of what it is dequantized to.
        granularity: how many elements share a scale, in words.
        bytes: of the layer's tensors.
        transform: ``"yes"``, or why no adapter can go on it.
        merge: ``"yes"``, or what stands in the way.
        export: ``"yes"``, or what stands in the way.
    """

    path: str
    kind: str
    shape: tuple[int, int] | None
    dtypes: str
    granularity: str
    bytes: int
    transform: str
    merge: str
    export: str


def describe(model: nn.Module) -> list[Description]:
    """Each layer of ``model`` that has a base: what it is, and what fadapt can do with it.

    Args:
        model: only read.

    Returns:
        A :class:`Description` a layer. ``fadapt inspect`` prints them (:func:`table`).

    Example:
        >>> import torch, fadapt
        >>> (one,) = fadapt.describe(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> one.path, one.kind, one.shape, one.bytes, one.transform
        ('0', 'Dense', (3, 4), 60, 'yes')
    """
    return list(_descriptions(model))


def table(rows: list[Description]) -> str:
    """The descriptions as lines of text.

    Example:
        >>> import torch
        >>> from fadapt.describe import describe, table
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> print(table(describe(model)).splitlines()[-1])
        2 layers, 160 bytes
    """
    head = Description._fields
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(row[k]) for row in [list(head), *cells]) for k in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(head), *cells]
    ]
    total = sum(row.bytes for row in rows)
    return "\n".join([*lines, f"{len(rows)} layers, {total:,} bytes"])


def _descriptions(model: nn.Module) -> Iterator[Description]:
    for path, module in model.named_modules():
        if not is_supported(module):
            continue
        try:
            base = base_of(module)
        except UnsupportedLayerError as error:
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            no = f"no: {error}"
            yield Description(path, type(module).__name__, None, "", "", size, no, "no", "no")
            continue
        yield Description(
            path,
            type(base).__name__,
            (base.out_features, base.in_features),
            *_format(base),
            _bytes(base),
            "yes",
            _merge(base),
            _export(base),
        )


def _bytes(base: Base) -> int:
    leaves = [t for t in tree_leaves(base) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in leaves)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _format(base: Any) -> tuple[str, str]:
    if isinstance(base, Dense):
        return _name(base.dtype), "none"
    kind = type(base).__name__
    if kind == "Aqlm":
        books, size = base.codebooks.shape[:2]
        group = base.codebooks.shape[-1] * base.codebooks.shape[-2]
        return (
            f"{_name(base.codes.dtype)} -> {_name(base.dtype)}",
            f"{books} codes of {size} entries for {group} weights",
        )
    if not hasattr(base, "grid"):
        return _name(base.dtype), "its own"
    scale = base.grid().scale
    # An Int4's codes are unpacked from its bytes: not to be asked for their dtype alone.
    bits = "int4" if kind == "Int4" else _name(base.codes().dtype)
    bits = f"int{base.bits} in {bits}" if kind == "Intx" else bits
    shape = tuple(scale.shape)
    if shape == (1, 1) and base.out_features > 1:
        words = "a scale for all"
    elif shape[1] == 1:
        words = "a scale a row"
    else:
        words = f"a scale for {base.in_features // shape[1]} of a row"
    return f"{bits} -> {_name(base.dtype)}", words


def _merge(base: Any) -> str:
    if type(base).__name__ == "Aqlm":
        return "on request (aqlm=fadapt.Recode()): codes seldom change"
    if getattr(base, "act_pre_scale", None) is not None:
        return "no: it scales its input first (SmoothQuant, AWQ)"
    return "yes" if isinstance(base, Dense) or hasattr(base, "grid") else "by its requantize"


def _export(base: Any) -> str:
    if getattr(base, "layer", None) is not None and base.device.type == "hpu":
        return "no: a Gaudi's own GEMM has no export"
    return "yes"
