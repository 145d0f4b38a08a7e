"""torchao's int8 weights in every version that fadapt reads: ``Int8Tensor``, and up to 0.17 the
``AffineQuantizedTensor`` that its configs make by default there."""

from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
)

VERSION = tuple(int(part) for part in version("torchao").split(".")[:2])
HAS_AFFINE = VERSION < (0, 18)
_NEWER = {"version": 2} if HAS_AFFINE else {}  # of the two classes


def weight_only(granularity: Any = None) -> Any:
    """The config of an ``Int8Tensor``; but torchao 0.16 runs none by group, and makes an affine."""
    if VERSION < (0, 17) and isinstance(granularity, PerGroup):
        return Int8WeightOnlyConfig(group_size=granularity.group_size)
    return Int8WeightOnlyConfig(granularity=granularity or PerRow(), **_NEWER)


def dynamic(**options: Any) -> Any:
    """The config of an ``Int8Tensor`` that rounds its activations."""
    return Int8DynamicActivationInt8WeightConfig(**options, **_NEWER)


# Read as Int8; those that round with a zero point, or hold fewer bits, as Intx.
AFFINE_INT8 = ("row", "group", "tensor", "group-zeros", "dynamic")
AFFINE_INTX = ("dynamic-zeros", "int4-dynamic")


def inner(weight: Any) -> Any:
    """The quantized tensor, out of what rounds its activations."""
    return getattr(weight, "original_weight_tensor", weight)


def integers(weight: Any) -> torch.Tensor:
    """Those that the weight holds."""
    weight = inner(weight)
    return weight.tensor_impl.int_data if hasattr(weight, "tensor_impl") else weight.qdata


def scales(weight: Any) -> torch.Tensor:
    weight = inner(weight)
    return weight.tensor_impl.scale if hasattr(weight, "tensor_impl") else weight.scale


def affine(layer: nn.Module, kind: str) -> nn.Module:
    """The layer with an affine weight, by the functions that torchao's configs call (which pass
    over layers of 16 inputs and fewer)."""
    from torchao.dtypes import to_affine_quantized_intx
    from torchao.quantization import quant_api
    from torchao.quantization.linear_activation_quantized_tensor import (
        to_linear_activation_quantized,
    )
    from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain

    weight = layer.weight.detach()
    by_group = "group" in kind or "int4" in kind
    block = tuple(weight.shape) if kind == "tensor" else (1, 2 if by_group else weight.shape[1])
    options = {"eps": torch.finfo(torch.float32).eps, "zero_point_dtype": torch.int64}
    if kind in ("dynamic", "dynamic-zeros"):
        options["zero_point_domain"] = ZeroPointDomain.NONE
    if kind == "int4-dynamic":
        options |= {"quant_min": -8, "quant_max": 7}
    mapping = MappingType.ASYMMETRIC if kind == "group-zeros" else MappingType.SYMMETRIC
    weight = to_affine_quantized_intx(weight, mapping, block, torch.int8, **options)
    if kind == "dynamic":
        function = quant_api._int8_symm_per_token_reduced_range_quant
        weight = to_linear_activation_quantized(weight, function)
    elif "dynamic" in kind:
        weight = to_linear_activation_quantized(weight, quant_api._int8_asymm_per_token_quant)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
