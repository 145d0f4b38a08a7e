"""The adapter pytree, ``{layer path: parameters}``: made, counted, and scaled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt.errors import AdapterError
from fadapt.method import Method, over
from fadapt.shell import join, layers_of, read
from fadapt.trained import saved_modules, trained_biases

# The fields that an update is linear in.
_SCALED = ("lora_B", "lora_embedding_B", "lora_bias")


def init(method: Method, model: nn.Module, *, generator: torch.Generator | None = None) -> Any:
    """A fresh adapter for ``model``: it changes nothing yet.

    Args:
        method: which layers, and how.
        model: only read.
        generator: where numbers are drawn, in the order of the model's layers. May be left out for
            ``init="pissa"`` and ``"olora"``, which draw none.

    Returns:
        ``{path: parameters}``: for LoRA a NamedTuple ``(lora_A [r, in], lora_B [out, r])`` a layer;
        for each of ``modules_to_save`` a dict of copies of its parameters, for each bias that is
        trained a dict of its copy. They do not require
        gradients: ``torch.func.grad`` wants them so; for ``torch.optim``, call
        ``requires_grad_()`` on each leaf.

        With ``init="pissa"`` or ``"olora"``: ``(params, residual_state)``. These start from a part
        of the weight, and what is left of it, requantized to the base's own format, is the base
        that they need: ``bind(model, method, state=residual_state)``.

    Raises:
        TargetError: patterns and layers do not meet.
        ConfigError: numbers must be drawn, and there is no generator.
    """
    layers = layers_of(model, method)
    at = method.at(list(layers))
    params: dict[str, Any] = {}
    residual: dict[str, Tensor] = {}
    bases: dict[str, Any] = {}
    for path, layer in layers.items():
        base = bases[path] = read(path, layer)
        params[path], left = over(base, at[path], path).init_layer(base, generator)
        if left is not None:
            held = dict(layer.named_parameters()) | dict(layer.named_buffers())
            state = {n: t for n, t in left.state().items() if n in held}
            residual |= {join(path, name): tensor for name, tensor in state.items()}
    for path in saved_modules(model, method):
        held = dict(model.get_submodule(path).named_parameters())
        params[path] = {name: tensor.detach().clone() for name, tensor in held.items()}
    for entry, path in trained_biases(model, method, bases).items():
        owner: Any = bases[path] if path in bases else model.get_submodule(path)
        params[entry] = {"bias": owner.bias.detach().clone()}
    return (params, residual) if residual else params


def count(params: Any) -> int:
    """How many numbers an adapter, or a stack of them, holds."""
    return sum(leaf.numel() for leaf in tree_leaves(params))


def fold(params: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """The same adapter with its scaling moved into B, for a method whose scaling is 1.

    Differentiable, so it can stand inside a loss.
    """
    scalings = {p: m.scaling for p, m in method.at(_adapted(params)).items()}
    return scale_by(params, scalings)


def scale_by(
    params: Mapping[str, Any], scaling: float | Tensor | Mapping[str, float | Tensor]
) -> dict[str, Any]:
    """Every update of the adapter times ``scaling``: a number, a tensor ``[]``, or one a path.

    For training a stack of adapters with different scalings, map the scaling as data:
    ``vmap(grad(lambda p, s, x: loss(forward(scale_by(p, s), x))))``. Folding *before* the loss
    would change B's gradient by that factor.
    """
    return {
        path: _scale(leaf, scaling[path] if isinstance(scaling, Mapping) else scaling)
        if hasattr(leaf, "_fields")
        else leaf
        for path, leaf in params.items()
    }


def _scale(leaf: Any, scaling: float | Tensor) -> Any:
    fields = {n: getattr(leaf, n) * scaling for n in _SCALED if hasattr(leaf, n)}
    if not fields:
        raise AdapterError(f"{type(leaf).__name__} has no update that a number could scale.")
    return leaf._replace(**fields)


def _adapted(params: Mapping[str, Any]) -> list[str]:
    return [path for path, leaf in params.items() if hasattr(leaf, "_fields")]
