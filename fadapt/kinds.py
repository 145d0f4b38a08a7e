"""A bank of adapters of several methods: a stack for each kind, side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fadapt.errors import AdapterError
from fadapt.method import Method


@dataclass(frozen=True)
class Kinds:
    """The method of a bank whose adapters are of several kinds: LoRA, OFT, DoRA. Only
    :func:`fadapt.bind_mixed` takes it.

    Attributes:
        methods: of each kind. The bank is a tuple of as many stacks.
        order: where adapter i stands when the stacks are put one after the other; None if the ids
            count in that order already.
    """

    methods: tuple[Method, ...]
    order: tuple[int, ...] | None = None

    def flat(self, ids: Any) -> Any:
        """Ids in the order of the stacks, from those in the order in which adapters were given."""
        if self.order is None or not isinstance(ids, Iterable):
            return ids
        if isinstance(ids, Tensor) and not ids.dtype.is_floating_point:
            # One more for the base, and what is out of range stays so.
            table = torch.tensor(self.order, device=ids.device)
            inside = (ids >= 0) & (ids < len(self.order))
            return torch.where(inside, table[torch.where(inside, ids, 0)], ids)
        last = len(self.order)
        return [
            self.order[k] if isinstance(k, int) and not isinstance(k, bool) and 0 <= k < last else k
            for k in ids
        ]


def stack_kinds(
    adapters: Sequence[Mapping[str, Any]], methods: Sequence[Method], fold: bool
) -> tuple[Any, Any]:
    """``stack(adapters, methods)`` where the methods are not all LoRA: ``(stacks, kinds)``; of one
    kind, its stack and its method.

    All LoRA adapters are one kind, padded; of another method are one kind those that agree in every
    hyperparameter and shape.
    """
    from fadapt.lora import LoRA
    from fadapt.stacking import stack

    groups: list[tuple[Any, list[int]]] = []
    for k, (adapter, method) in enumerate(zip(adapters, methods, strict=True)):
        shapes = {p: [t.shape for t in tree_leaves(leaf)] for p, leaf in adapter.items()}
        key = "LoRA" if type(method) is LoRA else (method, shapes)
        mates = next((members for other, members in groups if other == key), None)
        if mates is None:
            groups.append((key, [k]))
        else:
            mates.append(k)
    stacks, kinds = [], []
    for key, members in groups:
        mine = [adapters[k] for k in members]
        if key == "LoRA":
            many, unit = stack(mine, [methods[k] for k in members], fold=fold)
        else:
            many, unit = stack(mine), methods[members[0]]
        stacks.append(many)
        kinds.append(unit)
    if len(kinds) == 1:
        return stacks[0], kinds[0]
    position = {k: i for i, k in enumerate(k for _, members in groups for k in members)}
    return tuple(stacks), Kinds(tuple(kinds), tuple(position[k] for k in range(len(adapters))))


def unstack_kinds(stacks: Sequence[Any], kinds: Kinds) -> list[dict[str, Any]]:
    """The adapters of :func:`stack_kinds`, one by one, as they went in."""
    from fadapt.stacking import unstack

    if len(stacks) != len(kinds.methods):
        raise AdapterError(f"{len(stacks)} stacks, but {len(kinds.methods)} kinds.")
    flat = [a for many, m in zip(stacks, kinds.methods, strict=True) for a in unstack(many, m)]
    return [flat[i] for i in kinds.order or range(len(flat))]
