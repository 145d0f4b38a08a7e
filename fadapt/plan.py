"""What a merge is about to do: every layer, its base, its adapters; all of it checked first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map

from fadapt.adapted import Adapted, Step
from fadapt.bases import Base
from fadapt.errors import AdapterError, ConfigError, MergeError, listing
from fadapt.functional import bind
from fadapt.shell import join


@dataclass(frozen=True)
class Plan:
    """The layers of a merge.

    Attributes:
        bases: ``{path: base}``, in the model's order.
        steps: ``{path: its adapters, in order}``, as the caller gave them.
        saved: ``{name: tensor}`` of modules that the adapters replace whole.
        biases: ``{name: tensor}`` of biases that they train, of these layers and of other modules.
    """

    bases: dict[str, Base]
    steps: dict[str, tuple[Step, ...]]
    saved: dict[str, Tensor]
    biases: dict[str, Tensor]

    @property
    def others(self) -> dict[str, Tensor]:
        """Those of the biases that are of other modules, by the module's path."""
        each = {name.rpartition(".")[0]: tensor for name, tensor in self.biases.items()}
        return {path: tensor for path, tensor in each.items() if path not in self.bases}

    @property
    def beside(self) -> dict[str, Tensor]:
        """``{name: tensor}`` that go into the result as they are, beside the merged layers."""
        return self.saved | {join(path, "bias"): tensor for path, tensor in self.others.items()}

    def adapted(self, path: str) -> Adapted:
        """One layer with its adapters prepared on it."""
        found = Adapted(self.bases[path], trained=self.biases.get(join(path, "bias")))
        for method, params in self.steps[path]:
            found = found.then(method, params, path)
        return found

    @property
    def owners(self) -> list[str]:
        """The paths of all modules that get tensors of their own: layers, and saved modules."""
        return [*self.bases, *dict.fromkeys(name.rpartition(".")[0] for name in self.saved)]

    def only(self, path: str) -> "Plan":
        """The plan for one of the layers."""
        name = join(path, "bias")
        biases = {name: self.biases[name]} if name in self.biases else {}
        return Plan({path: self.bases[path]}, {path: self.steps[path]}, {}, biases)


def plan(model: nn.Module, params: Any, method: Any, safe: bool = True) -> Plan:
    """Read every layer and check every adapter; computes nothing.

    Args:
        model: only read.
        params: one adapter, or a sequence of them, merged in that order.
        method: its method, or as many.
        safe: also look for NaN and Inf in the adapters.

    Raises:
        AdapterError: paths, shapes or dtypes do not fit; with ``safe``, NaN or Inf.
        ConfigError: as many methods as adapters are needed.
        MergeError: inside a transform.
    """
    pairs = list(_pairs(params, method))
    bases: dict[str, Base] = {}
    steps: dict[str, tuple[Step, ...]] = {}
    saved: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for given, one in pairs:
        if not isinstance(given, Mapping):
            raise AdapterError(f"expected an adapter {{path: ...}}, got a {type(given).__name__}.")
        adapter = {path: tree_map(_constant, leaf) for path, leaf in given.items()}
        forward = bind(model, one)
        forward._check(adapter)
        if safe:
            _check_finite(adapter)
        for path, layer in forward.layers.items():
            bases.setdefault(path, layer.base)
            steps[path] = (*steps.get(path, ()), Step(layer.method, adapter[path]))
        for path in forward.saved:
            at = forward.biases.get(path, path)
            own = forward.of_module(path, adapter[path])
            held = {join(at, name): t.detach() for name, t in own.items()}
            if held.keys() & (saved.keys() | biases.keys()):
                raise AdapterError(f"module {at!r} is trained by two of the adapters.")
            if path in forward.biases:
                biases |= held
            else:
                saved |= held
    order = {name: k for k, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for path, base in bases.items():
        if getattr(base, "act_pre_scale", None) is not None:
            raise MergeError(
                f"layer {path!r} scales its input (act_pre_scale: SmoothQuant, AWQ) before its "
                "weight, and merging does not take that into account: keep the adapter beside it."
            )
    paths = sorted(bases, key=lambda p: order[p])
    return Plan({p: bases[p] for p in paths}, {p: steps[p] for p in paths}, saved, biases)


def check_untied(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise MergeError if a layer shares its weight with another module.

    ``functional_call`` sets tied tensors together, so a state cannot untie them.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        for tensor in held:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(name)
    for path in paths:
        layer = model.get_submodule(path)
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            others = [name for name in owners.get(id(tensor), []) if name != path]
            if others:
                raise tied(path, others)


def tied(path: str, others: Sequence[str]) -> MergeError:
    """The error for a layer whose weight is that of other modules too."""
    return MergeError(
        f"layer {path!r} shares its weight with {listing(others)}: merging into it would change "
        "both. fadapt.merged_model gives this layer a weight of its own; or leave it out of the "
        "method's targets (exclude=) and its modules_to_save."
    )


def _pairs(params: Any, method: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    if isinstance(params, Mapping):
        if isinstance(method, Sequence):
            raise ConfigError("one adapter was given, and a sequence of methods: give one.")
        yield params, method
        return
    methods = list(method) if isinstance(method, Sequence) else [method] * len(params)
    if len(methods) != len(params) or not params:
        raise ConfigError(f"{len(params)} adapters were given, and {len(methods)} methods.")
    yield from zip(params, methods, strict=True)


def _constant(value: Any) -> Any:
    """A leaf without its history: with it, every block of W would be kept for a derivative."""
    if not isinstance(value, Tensor):
        return value
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise MergeError(
            "merging rounds, and is not differentiated or mapped over (torch.func.grad, vmap, jvp, "
            "...): call the forward that fadapt.bind returns in there, and merge outside, one "
            "adapter of a stack at a time (fadapt.unstack)."
        )
    return value.detach()


def _check_finite(adapter: Mapping[str, Any]) -> None:
    for path, leaf in adapter.items():
        for key, tensor in tree_flatten_with_path(leaf)[0]:
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise AdapterError(
                    f"layer {path!r}: {str(key[0]).lstrip('.')} {list(tensor.shape)} holds {count} "
                    "NaN or Inf. Nothing was merged. Train it again from a checkpoint before that; "
                    "safe=False merges all the same."
                )
