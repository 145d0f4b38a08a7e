"""Many adapters in one pytree: every leaf gains a leading axis K, for ``torch.func.vmap``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fadapt.adapter import scale_by
from fadapt.errors import AdapterError, ConfigError
from fadapt.kinds import Kinds, stack_kinds, unstack_kinds
from fadapt.lora import LoRA, LoRABiasParams, LoRAParams
from fadapt.method import Method
from fadapt.targets import exact_pattern
from fadapt.trained import beside

Adapter = Mapping[str, Any]


class Member(NamedTuple):
    """How one adapter of a stack looked at one layer before it was padded: ``kind`` is the
    NamedTuple of its parameters."""

    rank: int
    scaling: float
    kind: Any


@dataclass(frozen=True)
class StackedLoRA(LoRA):
    """The method of a stack of LoRA adapters that differ: what :func:`stack` returns beside it.

    Its own scaling is 1, its targets are the union of theirs.

    Attributes:
        members: for each adapter ``{path: Member}``, what :func:`unstack` needs.
        folded: whether the adapters' scalings were moved into B.
    """

    members: tuple[Mapping[str, Member], ...] = field(default=(), hash=False)
    folded: bool = True

    def scalings(self, like: Tensor | None = None) -> dict[str, Tensor]:
        """``{path: [K]}``, each adapter's scaling at each layer; 1 where it has none.

        What a training loop over an unfolded stack maps over beside the parameters (see
        :func:`fadapt.scale_by`). dtype and device are those of ``like``; float32 on the CPU
        without it.
        """
        paths = dict.fromkeys(path for member in self.members for path in member)
        like = torch.empty(0) if like is None else like
        return {
            path: like.new_tensor([m[path].scaling if path in m else 1.0 for m in self.members])
            for path in paths
        }


def stack(
    adapters: Sequence[Adapter], methods: Sequence[Method] | None = None, *, fold: bool = True
) -> Any:
    """Put K adapters side by side.

    Args:
        adapters: of one method, with equal paths and shapes; or, with ``methods``, LoRA adapters
            whose ranks, alphas, targets and biases may differ; or adapters of several methods, for
            a mixed batch alone.
        methods: one for each adapter. Ranks are then padded with zeros to the largest at each
            layer, and a layer that an adapter lacks is all zeros. Padding stays zero in training,
            without a mask: where A and B are both zero, so are their gradients.
        fold: with ``methods``, multiply each B by its ``alpha / rank``. Right for serving; to
            train, pass False, map over ``unit.scalings()`` and scale inside the loss.

    Returns:
        The stack ``{path: parameters [K, ...]}``; with ``methods``, ``(stack, unit)``: bind with
        ``unit``, and give it to :func:`unstack`. Of several methods it is a tuple of stacks and a
        :class:`fadapt.kinds.Kinds`, for :func:`fadapt.bind_mixed`.

    Raises:
        AdapterError: shapes, dtypes or paths differ where they may not.
        ConfigError: LoRA methods that differ in dropout or bias.

    Example:
        >>> import torch, fadapt
        >>> model, g = torch.nn.Linear(4, 3), torch.Generator().manual_seed(0)
        >>> small, large = fadapt.LoRA(rank=2, alpha=4), fadapt.LoRA(rank=3, alpha=3)
        >>> adapters = [fadapt.init(m, model, generator=g) for m in (small, large)]
        >>> many, unit = fadapt.stack(adapters, methods=[small, large])
        >>> forward = fadapt.bind(model, unit)
        >>> torch.func.vmap(forward, in_dims=(0, None))(many, torch.ones(5, 4)).shape
        torch.Size([2, 5, 3])
    """
    if not adapters:
        raise AdapterError("stack() was given no adapters.")
    if methods is None:
        return _stack_equal(adapters)
    if len(methods) != len(adapters):
        raise AdapterError(
            f"stack() was given {len(adapters)} adapters and {len(methods)} methods."
        )
    loras = [m for m in methods if type(m) is LoRA]
    if len(loras) != len(methods):
        return stack_kinds(adapters, methods, fold)
    if len({m.dropout for m in loras}) > 1:
        raise ConfigError(
            f"one forward has one dropout: these methods have {sorted({m.dropout for m in loras})}."
        )
    members = tuple(_members(a, m) for a, m in zip(adapters, loras, strict=True))
    ranks: dict[str, int] = {}
    for member in members:
        for path, layer in member.items():
            ranks[path] = max(ranks.get(path, 0), layer.rank)
    if len({m.bias for m in loras}) > 1:
        raise ConfigError(
            f"one stack trains the same biases in each; got bias={sorted({m.bias for m in loras})}."
        )
    rest = _saved(adapters)
    saved, _ = beside(adapters[0], loras[0])
    bias = any(layer.kind is LoRABiasParams for one in members for layer in one.values())
    widest = max(ranks.values())
    unit = StackedLoRA(
        rank=widest,
        alpha=widest,
        targets=exact_pattern(ranks),
        dropout=loras[0].dropout,
        lora_bias=bias,
        modules_to_save=saved,
        bias=loras[0].bias,
        members=members,
        folded=fold,
    )
    if fold:
        if any(layer.scaling == 0 for member in members for layer in member.values()):
            raise ConfigError("a scaling of 0 (alpha = 0) cannot be folded: nothing would be left.")
        adapters = [
            scale_by(a, {p: layer.scaling for p, layer in member.items()})
            for a, member in zip(adapters, members, strict=True)
        ]
    shapes = {path: _layer(adapters, path) for path in ranks}
    padded = [
        {p: _pad(a.get(p), shapes[p], rank, bias) for p, rank in ranks.items()}
        | {p: a[p] for p in rest}
        for a in adapters
    ]
    return _stack_equal(padded), unit


def unstack(stacked: Any, unit: Any = None) -> list[dict[str, Any]]:
    """The adapters of a stack, one by one, as they went in.

    Args:
        stacked: leaves ``[K, ...]``.
        unit: what ``stack(methods=...)`` returned: padding is cut off, and a folded scaling
            divided out again. Without folding, or where a scaling is a power of two, the bytes are
            those that went in; else B is within one rounding of them.

    Raises:
        AdapterError: leading axes differ, or ``unit`` belongs to another stack.
    """
    if isinstance(unit, Kinds):
        return unstack_kinds(stacked, unit)
    leaves, spec = tree_flatten(dict(stacked))
    sizes = {leaf.shape[0] if leaf.dim() else -1 for leaf in leaves}
    if len(sizes) != 1 or -1 in sizes:
        raise AdapterError(
            f"not a stack: its leaves' shapes are {[list(t.shape) for t in leaves]}."
        )
    (size,) = sizes
    adapters = [tree_unflatten([leaf[k] for leaf in leaves], spec) for k in range(size)]
    if not isinstance(unit, StackedLoRA):
        return adapters
    if len(unit.members) != size:
        raise AdapterError(f"a stack of {size}, but the unit method is of {len(unit.members)}.")
    return [_unpad(a, m, unit) for a, m in zip(adapters, unit.members, strict=True)]


def _stack_equal(adapters: Sequence[Adapter]) -> dict[str, Any]:
    first, spec = tree_flatten(dict(adapters[0]))
    for k, adapter in enumerate(adapters[1:], 1):
        # Order of paths aside, which is no difference between adapters.
        adapter = {p: adapter[p] for p in adapters[0] if p in adapter} | dict(adapter)
        leaves, other = tree_flatten(adapter)
        if other != spec:
            odd = sorted(adapters[0].keys() ^ adapter.keys())
            what = (
                f"paths {odd[:4]} are in one of them only" if odd else "parameters differ in kind"
            )
            raise AdapterError(
                f"adapters 0 and {k} cannot be stacked as they are: {what}. Pass methods=[...] to "
                "pad them."
            )
        for a, b in zip(first, leaves, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise AdapterError(
                    f"adapters 0 and {k} cannot be stacked as they are: a leaf is "
                    f"{a.dtype} {list(a.shape)} in one and {b.dtype} {list(b.shape)} in the other. "
                    "Pass methods=[...] to pad ranks; bring them to one dtype."
                )
    ordered = [{p: a[p] for p in adapters[0]} for a in adapters]
    return tree_map(lambda *leaves: torch.stack(leaves), *ordered)  # type: ignore[no-any-return]


def _members(adapter: Adapter, method: LoRA) -> dict[str, Member]:
    paths = [p for p, leaf in adapter.items() if hasattr(leaf, "_fields")]
    members = {}
    for path, at in method.at(paths).items():
        leaf = adapter[path]
        rank = leaf[0].shape[0]
        if rank != at.rank or ("lora_bias" in leaf._fields) != at.lora_bias:
            raise AdapterError(
                f"layer {path!r}: the method says rank {at.rank} and lora_bias={at.lora_bias}, the "
                f"adapter has rank {rank} and {leaf._fields}. Give each adapter the method that it "
                "was made with."
            )
        members[path] = Member(at.rank, at.scaling, type(leaf))
    return members


def _saved(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    each: list[set[str]] = [
        {p for p, leaf in a.items() if not hasattr(leaf, "_fields")} for a in adapters
    ]
    if any(s != each[0] for s in each):
        odd = sorted({p for s in each for p in s ^ each[0]})
        raise AdapterError(
            f"modules_to_save {odd[:4]} (or biases) are in some of the adapters only; a stack "
            "cannot pad what is trained itself. Add a copy of the model's own to the others."
        )
    return tuple(p for p in adapters[0] if p in each[0])


def _layer(adapters: Sequence[Adapter], path: str) -> Any:
    return next(a[path] for a in adapters if path in a)


def _pad(leaf: Any, like: Any, rank: int, bias: bool) -> Any:
    leaf = tree_map(torch.zeros_like, like) if leaf is None else leaf
    A, B = leaf[:2]
    missing = rank - A.shape[0]
    A, B = F.pad(A, (0, 0) * (A.dim() - 1) + (0, missing)), F.pad(B, (0, missing))
    if bias and isinstance(leaf, LoRAParams | LoRABiasParams):
        return LoRABiasParams(A, B, getattr(leaf, "lora_bias", B.new_zeros(B.shape[0])))
    return type(leaf)(A, B)


def _unpad(adapter: Adapter, member: Mapping[str, Member], unit: StackedLoRA) -> dict[str, Any]:
    one: dict[str, Any] = {}
    for path, (rank, scaling, kind) in member.items():
        A, B, *bias = adapter[path]
        values = [A[:rank], B[:, :rank], *bias][: len(kind._fields)]
        if unit.folded:
            values[1:] = [value / scaling for value in values[1:]]
        one[path] = kind(*values)
    return one | {p: leaf for p, leaf in adapter.items() if not hasattr(leaf, "_fields")}
