"""How the adapters of one method lie in a bank: each is one row of a matrix."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bases import Base
from fadapt.errors import ConfigError, listing, near
from fadapt.lora import LoRA, LoRABiasParams, LoRAParams
from fadapt.method import over
from fadapt.shell import layers_of, read
from fadapt.targets import exact_pattern

# Where a leaf starts in its row: on a boundary that every kernel's loads are aligned to.
_ALIGN = 64
# Of a method, what does not change what its trained parameters mean.
_FREE = ("targets", "exclude", "layers_to_transform", "layers_pattern", "init", "dropout", "dtype")


@dataclass(frozen=True)
class Shelf:
    """The layout of one kind's adapters.

    Attributes:
        template: the method that was given.
        unit: the method that runs them: LoRA's scaling is 1, being folded into B.
        bases: ``{path: base}``.
        kinds: ``{path: the NamedTuple of one layer's (prepared) parameters}``.
        shapes: ``{path: of each of its fields}``.
        starts: ``{path: of each of its fields}``: where it begins in a row.
        width: of a row.
    """

    template: Any
    unit: Any
    bases: Mapping[str, Base]
    kinds: Mapping[str, Any]
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    starts: Mapping[str, tuple[int, ...]]
    width: int

    @property
    def device(self) -> torch.device:
        """That of the layers."""
        return next(iter(self.bases.values())).device

    def leaves(self, rows: Tensor) -> dict[str, Any]:
        """``rows [..., width]`` as ``{path: parameters [..., ...]}``: views."""
        return {
            path: self.kinds[path](
                *(
                    rows.narrow(-1, start, math.prod(shape)).unflatten(-1, shape)
                    for start, shape in zip(self.starts[path], shapes, strict=True)
                )
            )
            for path, shapes in self.shapes.items()
        }

    def refuses(self, params: Mapping[str, Any], method: Any) -> str | None:
        """Why this adapter has no place here; None if it has.

        Raises:
            AdapterError: the adapter does not fit the model, or its own method.
        """
        name = type(self.template).__name__
        if type(method) is not type(self.template) and not self._takes(method):
            return f"it is {type(method).__name__}, and the place is for {name}"
        saved = [path for path, leaf in params.items() if not hasattr(leaf, "_fields")]
        if saved:
            return (
                f"it has modules or biases trained themselves ({listing(saved)}), which a mixed "
                "batch cannot wear"
            )
        if not params:
            return "it adapts no layer"
        if unknown := sorted(params.keys() - self.bases.keys()):
            return (
                f"its layers {listing(unknown)} are not among the {len(self.bases)} that the bank "
                f"adapts.{near(unknown[0], self.bases)}".rstrip(".")
            )
        at = method.at(list(params))
        for path, leaf in params.items():
            over(self.bases[path], at[path], path).check(self.bases[path], leaf, path)
        return self._refuses_lora(params) if self._takes(method) else self._refuses(params, method)

    def _takes(self, method: Any) -> bool:
        return _is_lora(method) and _is_lora(self.template)

    def _refuses_lora(self, params: Mapping[str, Any]) -> str | None:
        for path, leaf in params.items():
            room, rank = self.shapes[path][0][0], leaf[0].shape[0]
            if rank > room:
                return f"layer {path!r} has rank {rank}, the bank room for {room}"
            if hasattr(leaf, "lora_bias") and self.kinds[path] is not LoRABiasParams:
                return "it has learned biases: make the bank with LoRA(lora_bias=True)"
        return None

    def _refuses(self, params: Mapping[str, Any], method: Any) -> str | None:
        mine, its = self.template, method
        odd = [
            f"{f.name}={getattr(its, f.name)!r} against {getattr(mine, f.name)!r}"
            for f in fields(mine)
            if f.name not in _FREE and getattr(mine, f.name) != getattr(its, f.name)
        ]
        if odd:
            return f"its {type(method).__name__} differs in {', '.join(odd)}"
        if missing := sorted(self.bases.keys() - params.keys()):
            return f"it lacks the layers {listing(missing)}"
        return None

    def row(self, params: Mapping[str, Any], method: Any) -> Tensor:
        """The adapter as one row ``[width]``, prepared, or padded and scaled."""
        first = next(iter(params.values()))[0]
        row: Tensor = first.new_zeros(self.width)
        places = self.leaves(row)
        if not self._takes(method):
            for path, leaf in method.prepare(params, self.bases).items():
                for place, value in zip(places[path], leaf, strict=True):
                    place.copy_(value.detach())
            return row
        for path, at in method.at(list(params)).items():
            leaf, place = params[path], places[path]
            A, B = (t.detach() for t in leaf[:2])
            place[0][: len(A)].copy_(A)
            place[1][:, : len(A)].copy_(B * at.scaling)
            if hasattr(leaf, "lora_bias"):
                place.lora_bias.copy_(leaf.lora_bias.detach() * at.scaling)
        return row


def rooms_for(adapters: Iterable[tuple[Mapping[str, Any], Any]]) -> list[tuple[Any, int]]:
    """The methods that a bank for these adapters is made with, and how many each is for.

    All LoRA adapters share one: at each layer the largest of their ranks. Others share one if they
    agree in every hyperparameter and adapt the same layers.
    """
    ranks: dict[str, int] = {}
    loras, bias = 0, False
    others: dict[Any, int] = {}
    for params, method in adapters:
        layers = {path: leaf for path, leaf in params.items() if hasattr(leaf, "_fields")}
        if not _is_lora(method):
            free = {f.name: f.default for f in fields(method) if f.name in _FREE}
            free |= {"targets": exact_pattern(sorted(layers)), "modules_to_save": ()}
            room = replace(method, **free)
            others[room] = others.get(room, 0) + 1
            continue
        loras += 1
        for path, leaf in layers.items():
            ranks[path] = max(ranks.get(path, 0), leaf[0].shape[0])
            bias = bias or hasattr(leaf, "lora_bias")
    found = list(others.items())
    if ranks:
        # The longest first: a shorter path may be the end of a longer one.
        pattern = {re.escape(p): ranks[p] for p in sorted(ranks, key=len, reverse=True)}
        widest, targets = max(ranks.values()), exact_pattern(ranks)
        room = LoRA(widest, targets=targets, rank_pattern=pattern, lora_bias=bias)
        found.insert(0, (room, loras))
    return found


def shelf_of(method: Any, model: nn.Module) -> Shelf:
    """The layout for adapters of this method.

    Raises:
        ConfigError: modules saved whole, or an adapter whose residual the model would need.
        TargetError: targets and layers do not meet.
    """
    if method.modules_to_save or method.bias != "none":
        raise ConfigError(
            "a bank holds no modules_to_save and no trained biases: a mixed batch cannot wear them."
        )
    bases = {path: read(path, layer) for path, layer in layers_of(model, method).items()}
    like = _example(method, bases)
    shapes = {path: tuple(tuple(t.shape) for t in leaf) for path, leaf in like.items()}
    kinds = {path: type(leaf) for path, leaf in like.items()}
    unit = method
    if _is_lora(method):
        widest = max(one.rank for one in method.at(list(bases)).values())
        unit = LoRA(
            widest, widest, targets=exact_pattern(bases), lora_bias=method.lora_bias,
        )  # fmt: skip
    starts, width = {}, 0
    for path, each in shapes.items():
        begins = []
        for shape in each:
            begins.append(width)
            width += -(-math.prod(shape) // _ALIGN) * _ALIGN
        starts[path] = tuple(begins)
    return Shelf(method, unit, bases, kinds, shapes, starts, width)


def _example(method: Any, bases: Mapping[str, Base]) -> Mapping[str, Any]:
    # What an adapter of this method looks like: its numbers are not used.
    plain = replace(method, init="kaiming") if hasattr(method, "init") else method
    generator = torch.Generator().manual_seed(0)
    at = plain.at(list(bases))
    fresh = {
        path: over(base, at[path], path).init_layer(base, generator)[0]
        for path, base in bases.items()
    }
    prepared: Mapping[str, Any] = plain.prepare(fresh, bases)
    return prepared


def _is_lora(method: Any) -> bool:
    # By its parameters: a subclass with others of its own (DoRA) is none.
    return isinstance(method, LoRA) and method.params_type in (LoRAParams, LoRABiasParams)
