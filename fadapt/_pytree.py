"""Frozen dataclasses as pytrees: tensors are the leaves, everything else is static."""

import dataclasses
from typing import Any, TypeVar

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node

T = TypeVar("T")


def frozen_pytree(cls: type[T]) -> type[T]:
    """Register a frozen dataclass with ``torch.utils._pytree``.

    Which fields are leaves is read off each instance: a field that holds a tensor is a leaf, any
    other value (None, a dtype, a tuple of sizes) is part of the structure. torch's own
    ``register_dataclass`` takes every field for data, and so a ``None`` for a leaf, over which
    ``vmap`` then raises.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def flatten_with_keys(obj: Any) -> tuple[list[tuple[Any, Any]], Any]:
        values = [(n, getattr(obj, n)) for n in names]
        leaves = [(GetAttrKey(n), v) for n, v in values if isinstance(v, torch.Tensor)]
        static = tuple((n, v) for n, v in values if not isinstance(v, torch.Tensor))
        return leaves, (tuple(k.name for k, _ in leaves), static)

    def flatten(obj: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten_with_keys(obj)
        return [v for _, v in leaves], context

    def unflatten(leaves: Any, context: Any) -> Any:
        present, static = context
        return cls(**dict(zip(present, leaves, strict=True)), **dict(static))

    register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls
