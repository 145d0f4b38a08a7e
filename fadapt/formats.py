"""Formats by name, for merging from one into another; and the layer that holds a base."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bases import Base, Dense
from fadapt.errors import ConfigError, UnsupportedLayerError

_DENSE = {
    "dense": None,  # the base's own floating dtype
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def like_named(name: str, base: Base) -> Any:
    """A base of the format ``name``, of the shape of ``base``, its numbers yet to be written.

    Args:
        name: ``"dense"`` (in the base's dtype), ``"float32"``, ``"bfloat16"``, ``"float16"``;
            torchao's ``"float8"`` and
            ``"int8"`` (a scale a row), ``"int8-tensor"``, ``"int8-group32"`` (any
            number), ``"int8-dynamic"`` (activations rounded too).
        base: what the layer is now.

    Raises:
        ConfigError: no such format, or it does not fit the shape.
    """
    shape = (base.out_features, base.in_features)
    if name == "float8":
        from fadapt.bases.float8 import empty_float8

        return empty_float8(base)
    if name in _DENSE:
        weight = torch.empty(shape, dtype=_DENSE[name] or base.dtype, device=base.device)
        turned = isinstance(base, Dense) and base.transposed  # transformers' Conv1D
        return Dense(weight, transposed=turned)
    found = re.fullmatch(r"int8(-tensor|-dynamic|-group(\d+))?", name)
    if found:
        return _int8(found[1] or "", int(found[2] or 0), base)
    raise ConfigError(
        f"to={name!r}: no such format. Formats: {', '.join(_DENSE)}, float8, int8, int8-tensor, "
        "int8-group<size>, int8-dynamic."
    )


def _int8(kind: str, group: int, base: Base) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    from fadapt.bases.int8 import empty_int8

    if group and base.in_features % group:
        raise ConfigError(f"groups of {group} do not divide the {base.in_features} inputs.")
    granularity = PerGroup(group) if group else PerTensor() if kind == "-tensor" else PerRow()
    return empty_int8(base, granularity, dynamic=kind == "-dynamic")


def rebuilt(layer: nn.Module, old: Base, new: Any) -> nn.Module:
    """``layer`` with ``new`` in it: the vendor's own layer for its format.

    Args:
        layer: a copy that is the caller's to change.
        old: the base that it was read as.
        new: the base that it is to hold.
    """
    if type(new).__module__ == "fadapt.bases.aqlm":
        from fadapt.bases.aqlm import aqlm_layer

        fresh: nn.Module = aqlm_layer(new).train(layer.training)
        return fresh
    if type(new).__module__ == "fadapt.bases.inc_fp8" and type(old) is type(new):
        from fadapt.bases.inc_fp8 import inc_layer

        base: Any = new
        return inc_layer(base, layer)
    state = new.state()
    if type(new) is not type(old):
        if set(state) - {"weight", "bias"}:
            raise UnsupportedLayerError(f"no layer can be made for a {type(new).__name__}.")
        fresh = nn.Linear(new.in_features, new.out_features, new.bias is not None, device="meta")
        layer = fresh.train(layer.training)
    for name, tensor in state.items():
        put(layer, name, tensor)
    return layer


def put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer of ``layer``, of whatever name, to a frozen ``tensor``."""
    *path, last = name.split(".")
    owner = layer.get_submodule(".".join(path))
    if last in owner._buffers:
        owner._buffers[last] = tensor
    else:
        owner._parameters[last] = nn.Parameter(tensor.detach(), requires_grad=False)
