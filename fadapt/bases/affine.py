"""torchao's ``AffineQuantizedTensor``, alone or in a ``LinearActivationQuantizedTensor``: what its
int8 configs make by default up to 0.17, and 0.18 no longer has.

It is read as :class:`fadapt.bases.int8.Int8`, or as :class:`fadapt.bases.intx.Intx` where it has
fewer bits, or rounds its activations with a zero point. The numbers follow
``torchao/dtypes/affine_quantized_tensor_ops.py`` and ``dtypes/uintx/plain_layout.py``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.dtypes import AffineQuantizedTensor, PlainLayout
from torchao.dtypes.uintx.plain_layout import PlainAQTTensorImpl
from torchao.quantization.linear_activation_quantized_tensor import LinearActivationQuantizedTensor
from torchao.quantization.quant_primitives import ZeroPointDomain

from fadapt.bases.int8 import Int8
from fadapt.bases.int8_product import Activation
from fadapt.bases.intx import Intx
from fadapt.bases.protocol import register_weight
from fadapt.errors import UnsupportedLayerError

# The functions that torchao rounds activations by: _int8_symm_per_token_reduced_range_quant and
# _int8_asymm_per_token_quant of torchao/quantization/quant_api.py.
_SYMMETRIC = Activation(
    per_row=True,
    asymmetric=False,
    quant_min=-127,
    quant_max=127,
    wide_scale=False,
    eps=1e-5,
    early=False,
)
_ROUNDINGS = {
    "_int8_symm_per_token_reduced_range_quant": "symmetric",
    "_int8_asymm_per_token_quant": "asymmetric",
}


class _Form(NamedTuple):
    """What the tensor holds that a base does not."""

    quant_min: int | None
    quant_max: int | None
    zero_point_domain: Any
    zero_point_dtype: torch.dtype | None
    scale_dim: int  # a scale for all has no axis, one a row has one
    rounding: tuple[Any, Any] | None  # of LinearActivationQuantizedTensor

    def weight(self, base: Any) -> Tensor:
        zero = None
        if self.zero_point_dtype is not None:
            zero = torch.zeros_like(base.scale) if base.zero_point is None else base.zero_point
            zero = self._shaped(zero.to(self.zero_point_dtype))
        tensor: Tensor = AffineQuantizedTensor(
            PlainAQTTensorImpl(base.qdata, self._shaped(base.scale), zero, PlainLayout()),
            base.block_size,
            base.qdata.shape,
            self.quant_min,
            self.quant_max,
            self.zero_point_domain,
            dtype=base.dtype,
        )
        if self.rounding is not None:
            tensor = LinearActivationQuantizedTensor(tensor, *self.rounding)
        return tensor

    def _shaped(self, values: Tensor) -> Tensor:
        return values if self.scale_dim == 2 else values.reshape([-1] * self.scale_dim)


def _read(weight: AffineQuantizedTensor, module: nn.Linear) -> Int8 | Intx:
    return _base(weight, module, None)


def _read_rounding(weight: LinearActivationQuantizedTensor, module: nn.Linear) -> Int8 | Intx:
    inner, function = weight.original_weight_tensor, weight.input_quant_func
    known = _ROUNDINGS.get(getattr(function, "__name__", ""))
    if not isinstance(inner, AffineQuantizedTensor) or known is None or weight.quant_kwargs:
        raise UnsupportedLayerError(
            f"A LinearActivationQuantizedTensor of a {type(inner).__name__} whose activations are "
            f"rounded by {getattr(function, '__qualname__', function)} with {weight.quant_kwargs}. "
            f"Read are AffineQuantizedTensor with {', '.join(_ROUNDINGS)}: what "
            "Int8DynamicActivationInt8WeightConfig() makes."
        )
    return _base(inner, module, (function, weight.quant_kwargs))


def _base(weight: AffineQuantizedTensor, module: nn.Linear, rounding: Any) -> Int8 | Intx:
    layout = type(weight._layout).__name__
    data, scale, zero = _plain(weight)
    if data is None or weight.zero_point_domain == ZeroPointDomain.FLOAT:
        raise UnsupportedLayerError(
            f"An AffineQuantizedTensor {list(weight.shape)} in {layout}, its zero points "
            f"{weight.zero_point_domain.name}: fadapt reads int8 linears [out, in] in PlainLayout, "
            "with zero points INT or NONE. Quantize with Int8WeightOnlyConfig or "
            "IntxWeightOnlyConfig."
        )
    block = (weight.block_size[0], weight.block_size[1])
    form = _Form(
        weight.quant_min,
        weight.quant_max,
        weight.zero_point_domain,
        None if zero is None else zero.dtype,
        scale.dim(),
        rounding,
    )
    shape = (data.shape[0] // block[0], data.shape[1] // block[1])
    if zero is not None:
        zero = zero.reshape(shape) if bool(zero.any()) else None
    low = -128 if weight.quant_min is None else int(weight.quant_min)
    high = 127 if weight.quant_max is None else int(weight.quant_max)
    bias = None if module.bias is None else module.bias.detach()
    kind = None if rounding is None else _ROUNDINGS[rounding[0].__name__]
    by_row = block == (1, data.shape[1])
    # Its own fast products pass over the zero points.
    fast = (low, high) == (-128, 127) and (
        kind == "symmetric"
        or (kind is None and by_row and weight.zero_point_domain == ZeroPointDomain.INT)
    )
    bits = (high - low).bit_length()
    whole = low == -(2 ** (bits - 1)) and high == -low - 1  # all that so many bits hold
    if (
        (kind == "symmetric" and not (fast and by_row))
        or (kind == "asymmetric" and not whole)
        or (fast and zero is not None)
    ):
        raise UnsupportedLayerError(
            f"An AffineQuantizedTensor of integers from {low} to {high}, block_size {list(block)}, "
            f"{'with' if zero is not None else 'without'} zero points, "
            f"{'weight-only' if kind is None else 'its activations rounded'}: torchao's own linear "
            "ignores the zero points there, or takes no such blocks. Quantize the weight per row, "
            "symmetrically, to all of int8."
        )
    if whole and (kind == "asymmetric" or bits < 8):
        return Intx(
            qdata=data,
            scale=scale.reshape(shape),
            block_size=block,
            bits=bits,
            dtype=weight.dtype,
            bias=bias,
            zero_point=zero,
            rounds=kind is not None,
            wide_scale=True,
            form=form,
        )
    return Int8(
        qdata=data,
        scale=scale.reshape(shape),
        block_size=block,
        dtype=weight.dtype,
        bias=bias,
        zero_point=zero,
        activation=None if kind is None else _SYMMETRIC,
        bounds=(low, high),
        by_value=not fast,
        form=form,
    )


def _plain(weight: AffineQuantizedTensor) -> Any:
    if type(weight._layout) is not PlainLayout or weight.dim() != 2:
        return None, None, None
    data, scale, zero = weight.tensor_impl.get_plain()
    if data.dtype != torch.int8:
        return None, None, None
    return data.detach(), scale.detach(), None if zero is None else zero.detach()


register_weight(AffineQuantizedTensor, _read)
register_weight(LinearActivationQuantizedTensor, _read_rounding)
