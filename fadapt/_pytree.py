"""Frozen dataclasses as pytrees: tensors are the leaves, everything else is static."""

import dataclasses
from typing import Any, TypeVar

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node

T = TypeVar("T")
_LEAVES = "_pytree_leaves"


def frozen_pytree(cls: type[T]) -> type[T]:
    """Register a frozen dataclass with ``torch.utils._pytree``.

    Which fields are leaves is read off each instance: a field that holds a tensor is a leaf, any
    other value (None, a dtype, a tuple of sizes) is part of the structure. torch's own
    ``register_dataclass`` takes every field for data, and so a ``None`` for a leaf, over which
    ``vmap`` then raises. An instance made of other leaves than tensors (``vmap`` broadcasts its
    ``in_dims`` over one of numbers) remembers which they are.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def flatten_with_keys(obj: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values = [(n, getattr(obj, n)) for n in names]
        present = vars(obj).get(_LEAVES)
        if present is None:
            present = tuple(n for n, v in values if isinstance(v, torch.Tensor))
        leaves = [(GetAttrKey(n), v) for n, v in values if n in present]
        static = tuple((n, v) for n, v in values if n not in present)
        return leaves, (present, static)

    def flatten(obj: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten_with_keys(obj)
        return [v for _, v in leaves], context

    def unflatten(leaves: Any, context: Any) -> Any:
        present, static = context
        named = dict(zip(present, leaves, strict=True))
        made = cls(**named, **dict(static))
        if not all(isinstance(v, torch.Tensor) for v in named.values()):
            vars(made)[_LEAVES] = present
        return made

    register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls
