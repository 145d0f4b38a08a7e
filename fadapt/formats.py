"""Formats by name, for merging from one into another; and the layer that holds a base."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fadapt.bases import Base, Conv, Dense, Embedding
from fadapt.errors import AdapterError, ConfigError, UnsupportedLayerError
from fadapt.quieting import quiet

_DENSE = {
    "dense": None,  # the base's own floating dtype
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


FORMATS = (
    "dense, float32, bfloat16, float16, float8, int8, int8-tensor, int8-group<size>, int8-dynamic, "
    "int<bits>, int<bits>-group<size> (1 to 7 bits), aqlm-<codebooks>x<bits>, "
    "aqlm-<codebooks>x<bits>-group<size>, inc-fp8"
)


class AqlmFormat(NamedTuple):
    """AQLM's sizes; as :func:`fadapt.bases.aqlm_fresh.encode` names them."""

    num_codebooks: int
    nbits_per_codebook: int
    in_group_size: int


def like_named(
    name: str, base: Base, path: str = "", amax: Mapping[str, float] | None = None
) -> Any:
    """A base of the format ``name``, of the shape of ``base``, its numbers yet to be written; of
    AQLM, whose numbers a search finds, its sizes.

    Args:
        name: ``"dense"`` (in the base's dtype), ``"float32"``, ``"bfloat16"``, ``"float16"``.
            Of torchao: ``"float8"`` and ``"int8"`` (a scale a row), ``"int8-tensor"``,
            ``"int8-group32"`` (any number), ``"int8-dynamic"`` (activations rounded too),
            ``"int4"`` (1 to 7 bits, a scale a row), ``"int4-group32"``.
            ``"aqlm-2x8"``, ``"aqlm-1x16"``: codebooks and their bits, groups of 8 inputs;
            ``"aqlm-2x8-group16"``.
            ``"inc-fp8"``: INC's QDQ layer, E4M3, a scale a channel.
        base: what the layer is now.
        path: of the layer, for messages.
        amax: ``{path: largest magnitude of the layer's inputs}``, which ``"inc-fp8"`` needs; see
            :func:`fadapt.input_amax`.

    Raises:
        ConfigError: no such format, or it does not fit the shape.
        AdapterError: ``"inc-fp8"`` without this layer's ``amax``.
    """
    shape = (base.out_features, base.in_features)
    if name in _DENSE:
        dtype = _DENSE[name] or base.dtype
        if isinstance(base, Dense):  # an embedding, a convolution, or transposed: as it is
            return replace(base, weight=torch.empty_like(base.weight, dtype=dtype), bias=None)
        return Dense(torch.empty(shape, dtype=dtype, device=base.device))
    if isinstance(base, Conv | Embedding):
        raise ConfigError(
            f"to={name!r}: layer {path!r} is a {type(base).__name__}, which stays dense: give "
            f"{', '.join(_DENSE)}, or merge it by itself."
        )
    if name == "inc-fp8":
        return _inc(base, path, amax)
    if name == "float8":
        from fadapt.bases.float8 import empty_float8

        return empty_float8(base)
    if found := re.fullmatch(r"int8(-tensor|-dynamic|-group(\d+))?", name):
        return _int8(found[1] or "", _group(found[2], base), base)
    if found := re.fullmatch(r"int([1-7])(?:-group(\d+))?", name):
        from fadapt.bases.intx import empty_intx

        return empty_intx(base, int(found[1]), _group(found[2], base) or base.in_features)
    if found := re.fullmatch(r"aqlm-(\d+)x(\d+)(?:-group(\d+))?", name):
        books, bits, group = int(found[1]), int(found[2]), _group(found[3] or "8", base)
        if books < 1 or not 1 <= bits <= 16:
            raise ConfigError(f"to={name!r}: AQLM has 1 or more codebooks, of 1 to 16 bits.")
        return AqlmFormat(books, bits, group)
    raise ConfigError(f"to={name!r}: no such format. Formats: {FORMATS}.")


def _group(digits: str | None, base: Base) -> int:
    if digits is None:
        return 0
    if int(digits) == 0 or base.in_features % int(digits):
        raise ConfigError(f"groups of {digits} do not divide the {base.in_features} inputs.")
    return int(digits)


def _inc(base: Base, path: str, amax: Mapping[str, float] | None) -> Any:
    found = None if amax is None else amax.get(path)
    if found is None or not 0 < float(found) < float("inf"):
        raise AdapterError(
            f"to='inc-fp8': layer {path!r} rounds its inputs to float8 too, and so needs their "
            f"largest magnitude, a positive number; got {found}. Pass amax="
            "fadapt.input_amax(model, params, method, batches)."
        )
    with quiet():
        from fadapt.bases.inc_fresh import empty_inc

    return empty_inc(base, float(found))


def _int8(kind: str, group: int, base: Base) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    from fadapt.bases.int8 import empty_int8

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
    if type(new).__module__ == "fadapt.bases.inc_fp8":
        from fadapt.bases import inc_fp8

        base: Any = new
        if type(old) is type(new) and old.layer is new.layer:  # type: ignore[attr-defined]
            return inc_fp8.inc_layer(base, layer)
        from fadapt.bases.inc_fresh import fresh_layer

        return fresh_layer(base).train(layer.training)
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
