"""The shell: a copy of a model's module tree that shares every tensor with it, and the layers that
take the places of its targets.
"""

import copy
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt.bases import Base, Dense, base_of, is_supported
from fadapt.bases.protocol import take_state
from fadapt.errors import AdapterError, UnsupportedLayerError, near
from fadapt.lending import Lender
from fadapt.method import Method
from fadapt.random import keep_mask
from fadapt.targets import find_targets


class AdaptedLinear(nn.Module):
    """A target layer inside a shell: its base, and room for one layer's parameters.

    Attributes:
        base: the frozen layer.
        method: the hyperparameters at this layer.
        base_layer: the layer itself, for code that asks a linear for its ``weight`` or
            ``in_features``.
    """

    def __init__(self, layer: nn.Module, base: Base, method: Method, path: str):
        super().__init__()
        self.base_layer = layer
        self.base = base
        self.method = method
        self.path = path
        self.lender: Lender | None = None
        # Told by the path alone, so that an adapter's masks do not depend on what else is adapted.
        self.stream = zlib.crc32(path.encode())
        self.kinds = {k._fields: k for k in (method.params_type, method.prepared_type)}
        self.fields = list(dict.fromkeys(name for fields in self.kinds for name in fields))
        for name in (*self.fields, "trained_bias", "dropout_seed", "dropout_keep"):
            self.register_buffer(name, None, persistent=False)
        # Hooks that were set on the layer fire as they did.
        self._forward_hooks = layer._forward_hooks
        self._forward_hooks_with_kwargs = layer._forward_hooks_with_kwargs
        self._forward_pre_hooks = layer._forward_pre_hooks
        self._forward_pre_hooks_with_kwargs = layer._forward_pre_hooks_with_kwargs
        self.train(layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``; one input, by whatever name the layer itself gives it."""
        (x,) = (*inputs, *named.values())
        held = self._buffers
        given = {n: t for n in self.fields if (t := held[n]) is not None}
        if not given:
            self.check_running()
            return self.biased().linear(x)
        params = self.kinds[tuple(given)](**given)
        return self.method.apply(self.biased(), params, x, self._keep(params, x))

    def check_running(self) -> None:
        """Raise AdapterError if no forward runs that could have given an adapter."""
        if self.lender is not None and not torch.compiler.is_compiling():
            self.lender.check(self.path)

    def biased(self) -> Base:
        """The base, with a bias that the adapter trains in place of its own."""
        bias = self._buffers["trained_bias"]
        return self.base if bias is None else replace(self.base, bias=bias)  # type: ignore[type-var]

    def _keep(self, params: Any, x: Tensor) -> Tensor | None:
        keep = self._buffers["dropout_keep"]
        seed = self._buffers["dropout_seed"]
        if seed is not None:
            shape = self.method.keep_shape(params, x)
            return keep_mask(seed + self.stream, shape, self.method.dropout)
        if keep is None:
            return None
        shape = self.method.keep_shape(params, x)
        if keep.shape != shape or keep.dtype != torch.bool:
            raise AdapterError(
                f"layer {self.path!r}: expected a dropout mask torch.bool {list(shape)} for an "
                f"input {list(x.shape)}; got {keep.dtype} {list(keep.shape)}."
            )
        return keep


def share(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module tree that shares every tensor with the model, detached.

    Args:
        model: left as it is.
        state: tensors that stand in for those of the model with these names.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    memo: dict[int, Any] = {}
    for module in model.modules():
        # vars() holds parameters, buffers, and tensors kept as plain attributes.
        for tensor in tree_leaves(vars(module)):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _frozen(tensor, tensor)
    for name, tensor in state.items():
        if name not in named:
            raise AdapterError(f"state: the model has no tensor {name!r}.{near(name, named)}")
        own = named[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise AdapterError(
                f"state: {name!r} is {own.dtype} {list(own.shape)} in the model, and got "
                f"{tensor.dtype} {list(tensor.shape)}. Pass what fadapt.init or fadapt.merge "
                "returned for this model, or a tensor like its own."
            )
        memo[id(named[name])] = _frozen(tensor, named[name])
    shell = copy.deepcopy(model, memo)
    for name in state:
        path, _, key = name.rpartition(".")
        take_state(shell.get_submodule(path), key, named[name])
    return shell


def _frozen(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


_REGISTERED = ("_parameters", "_buffers", "_modules")


def written_to(shell: nn.Module) -> dict[str, Any]:
    """``{name: value}`` of all that a forward of the shell may write to: its buffers, and its
    modules' plain attributes that are tensors, or hold some."""
    found: dict[str, Any] = {}
    kept: list[str] = []
    for path, module in shell.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLinear):
            kept.append(join(path, "base_layer."))
        elif not path.startswith(tuple(kept)):
            for name, value in vars(module).items():
                if name not in _REGISTERED and any(
                    isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
                    for leaf in tree_leaves(value)
                ):
                    found[join(path, name)] = value
    for name, buffer in shell.named_buffers(remove_duplicate=False):
        if not name.startswith(tuple(kept)):
            found[name] = buffer
    return found


def layers_of(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """The layers of ``model`` that ``method`` adapts, by path."""
    return find_targets(
        model,
        method.targets,
        method.exclude,
        method.layers_to_transform,
        method.layers_pattern,
        method.modules_to_save,
    )


def read(path: str, layer: nn.Module) -> Base:
    """``base_of``, with the path in the error."""
    try:
        return base_of(layer)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"layer {path!r}: {error}") from error


def quantized(layer: nn.Module) -> Base | None:
    """The base of a layer that is not adapted, unless it is dense.

    Our op stands in for the vendor's there too: some raise under a transform, or in a backward
    through them, and AQLM's writes to its codes.
    """
    if isinstance(layer, AdaptedLinear) or not is_supported(layer):
        return None
    try:
        base = base_of(layer)
    except UnsupportedLayerError:
        return None
    return None if isinstance(base, Dense) else base


def bias_at(shell: nn.Module, path: str) -> str:
    """Where the shell takes the trained bias of the module at ``path``."""
    adapted = isinstance(shell.get_submodule(path), AdaptedLinear)
    return join(path, "trained_bias" if adapted else "bias")


def join(path: str, name: str) -> str:
    """``path.name``; the model itself has the path ``""``."""
    return f"{path}.{name}" if path else name
