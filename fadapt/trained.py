"""What an adapter trains beside its layers: modules whole (``modules_to_save``), and biases."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fadapt.bases import Base
from fadapt.errors import ConfigError, TargetError
from fadapt.method import Method
from fadapt.targets import match_list


def saved_modules(model: nn.Module, method: Method) -> dict[str, list[str]]:
    """``{path: names of its parameters}`` of the modules that ``modules_to_save`` names."""
    paths = [name for name, _ in model.named_modules()]
    found = match_list(method.modules_to_save, paths, "modules_to_save")
    saved = {p: [n for n, _ in model.get_submodule(p).named_parameters()] for p in sorted(found)}
    for path in saved:
        if any(path != other and path.startswith(f"{other}.") for other in saved):
            raise TargetError(f"modules_to_save: {path!r} lies inside another saved module.")
    return saved


def trained_biases(model: nn.Module, method: Method, bases: Mapping[str, Base]) -> dict[str, str]:
    """``{path of its entry in the adapter: path of the module}`` of each bias that is trained.

    Args:
        model: only read.
        method: its ``bias`` says which.
        bases: of the adapted layers, whose biases have their entry at ``path.base_layer``, which is
            where PEFT keeps them.

    Raises:
        ConfigError: two modules share such a bias; or a base of a class of one's own cannot hold
            another.
    """
    if method.bias == "none":
        return {}
    found = {f"{p}.base_layer".lstrip("."): p for p, base in bases.items() if base.bias is not None}
    if method.bias == "all":
        inside = (*bases, *saved_modules(model, method))
        for name, _ in model.named_parameters():
            path, _, last = name.rpartition(".")
            if last == "bias" and not any(f"{path}.".startswith(f"{p}.") for p in inside if p):
                found |= {} if path in bases else {path: path}
    for path in found.values():
        base = bases.get(path)
        if base is not None and "bias" not in getattr(type(base), "__dataclass_fields__", {}):
            raise ConfigError(
                f"bias={method.bias!r}: layer {path!r} is read as a {type(base).__name__}, which "
                "cannot hold another bias: make it a dataclass with a field ``bias``."
            )
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if (bias := module._parameters.get("bias")) is not None:
            owners.setdefault(id(bias), []).append(path)
    for path in found.values():
        bias = model.get_submodule(path)._parameters.get("bias")
        others = [p for p in owners.get(id(bias), []) if not f"{p}.".startswith(f"{path}.")]
        if others:
            raise ConfigError(
                f"bias={method.bias!r}: {path!r} and {others[0]!r} share one bias, and training it "
                "would give each its own. Give them tensors of their own first."
            )
    return found


def beside(params: Mapping[str, Any], method: Method) -> tuple[list[str], list[str]]:
    """The entries of an adapter that are no layer's parameters: modules saved whole, and biases."""
    rest = [path for path, leaf in params.items() if not hasattr(leaf, "_fields")]
    if method.bias == "none":
        return rest, []
    names = method.modules_to_save
    whole = [p for p in rest if any(p == n or p.endswith(f".{n}") for n in names)]
    return whole, [p for p in rest if p not in whole]
