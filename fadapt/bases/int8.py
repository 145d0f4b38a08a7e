"""torchao's ``Int8Tensor``: int8 weights by row, tensor or group; weight-only, or with activations
rounded to int8 on the fly (dynamic) or by fixed scales (static).

The numbers follow ``torchao/quantization/quantize_/workflows/int8/int8_tensor.py``; those of the
older ``AffineQuantizedTensor`` (see affine.py) differ as :class:`Activation` and ``by_value`` say.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
from torchao.quantization.utils import get_block_size

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.int8_product import (
    Activation,
    Format,
    dequantize,
    dynamic,
    exports_integers,
    op,
    round_activation,
)
from fadapt.bases.precision import autocast_input
from fadapt.bases.protocol import Base, register_weight
from fadapt.errors import ConfigError, UnsupportedLayerError

# What this torchao's Int8Tensor holds: zero points since 0.17, a reduced range since 0.18.
_FIELDS = {*Int8Tensor.optional_tensor_data_names, *Int8Tensor.optional_tensor_attribute_names}
_WIDE_SCALES = "reduce_range" in _FIELDS  # float32, since 0.18; before, of what is quantized


@frozen_pytree
@dataclass(frozen=True)
class Int8:
    """``W = (qdata - zero_point) * scale``, one scale a block of ``block_size`` elements.

    Attributes:
        qdata: int8 ``[out, in]``.
        scale: ``[out, 1]`` (per row), ``[1, 1]`` (per tensor) or ``[out, in / g]`` (per group).
        block_size: ``(1, in)``, ``(out, in)`` or ``(1, g)``.
        dtype: the float dtype the weight was quantized from, and is dequantized to.
        bias: ``[out]`` or None.
        zero_point: like ``scale``, or None for all zeros.
        activation: None for weight-only.
        act_scale, act_zero_point: fixed scales of a static activation, else None.
        act_pre_scale: ``[in]``, multiplied into x first (SmoothQuant, AWQ), else None.
        bounds: the smallest and the largest integer.
        by_value: x is multiplied by the dequantized W, not by the integers and then the scales:
            always so per group, and where the layer's own product does so.
        form: how torchao's own tensor is made again: it has ``weight(base) -> Tensor``. None for
            the weight-only tensor of its newest class.
    """

    qdata: Tensor
    scale: Tensor
    block_size: tuple[int, int]
    dtype: torch.dtype
    bias: Tensor | None = None
    zero_point: Tensor | None = None
    activation: Activation | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    act_pre_scale: Tensor | None = None
    bounds: tuple[int, int] = (-128, 127)
    by_value: bool = False
    form: Any = None

    @property
    def in_features(self) -> int:
        return self.qdata.shape[-1]

    @property
    def out_features(self) -> int:
        return self.qdata.shape[-2]

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def linear(self, x: Tensor) -> Tensor:
        """``W x + b``, ``[..., in] -> [..., out]`` in x's dtype.

        The derivative is that of the exact product with W: straight through the activation's
        rounding, where there is one (torchao's own raises under ``grad``).
        """
        x = autocast_input(x)
        dtype = x.dtype
        if self.act_pre_scale is not None:
            x = x * self.act_pre_scale
        static = Format(
            self.dtype,
            dtype if self.activation is None or self.activation.early else None,
            by_value=self.by_value or self.block_size[1] < self.in_features,
            asymmetric=self.activation is not None and self.activation.asymmetric,
        )
        zero_point = () if self.zero_point is None else (self.zero_point,)
        weight = (self.qdata, self.scale, *zero_point)
        if self.activation is None:
            y = op(x, weight, static).to(dtype)
        else:
            # torchao's scale is float32: the product stays so until the bias has been added.
            wide = x.to(torch.promote_types(x.dtype, self.scale.dtype))
            aux = round_activation(x.detach(), self.activation, self.act_scale, self.act_zero_point)
            if exports_integers(x):
                y = dynamic(wide, static, *aux, *weight)
            elif torch.compiler.is_compiling():
                # What is compiled is differentiated through the body, and an integer product has
                # no derivative: multiply the rounded activation, straight through the rounding.
                rounded, scale, zero = aux
                flat = (rounded.to(wide.dtype) - zero.to(wide.dtype)) * scale.to(wide.dtype)
                y = op(wide + (flat - wide.detach()), weight, static)
            else:
                y = op.straight_through(wide, aux, weight, static)
        return (y if self.bias is None else y + self.bias).to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``, bit for bit torchao's ``Int8Tensor.dequantize``."""
        return dequantize(self.qdata, self.scale, self.zero_point, dtype or self.dtype)

    def requantize(self, weight: Tensor, scales: str = "auto") -> "Int8":
        """W ``[out, in]`` on this base's grid, or on a wider one where it does not fit.

        Args:
            weight: floating ``[out, in]``.
            scales: ``"auto"`` keeps a block's scale while the block fits its range, so that
                requantizing an unchanged weight gives back the same bytes (fresh symmetric scales
                would shrink by 0.4 % a pass); a block that does not fit gets the scale that torchao
                gives, amax / 127.5. ``"fresh"`` gives it to every block; ``"keep"`` to none, and
                what does not fit saturates.
        """
        check_weight_shape(self, weight)
        base: Int8 = requantize(self, weight, scales)
        return base

    def grid(self) -> Grid:
        low, high = self.bounds
        return Grid(self.scale, self.zero_point, torch.int8, low, high, (high - low) / 2)

    def codes(self) -> Tensor:
        return self.qdata

    def on_grid(self, grid: Grid, codes: Tensor) -> "Int8":
        return replace(self, qdata=codes, scale=grid.scale, zero_point=grid.zero)

    def rows(self, rows: slice) -> "Int8":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        qdata = self.qdata[rows]
        tall = self.block_size[0] > 1  # one scale for the whole tensor
        return replace(
            self,
            qdata=qdata,
            block_size=(len(qdata), self.in_features) if tall else self.block_size,
            scale=self.scale if tall else self.scale[rows],
            zero_point=self.zero_point
            if tall or self.zero_point is None
            else self.zero_point[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

    def state(self) -> dict[str, Tensor]:
        """``{"weight": ..., "bias": ...}``, a tensor of the class that was read, which torchao runs
        as it is."""
        bias = {} if self.bias is None else {"bias": self.bias}
        form = _Form(None) if self.form is None else self.form
        return {"weight": form.weight(self)} | bias


class _Form(NamedTuple):
    """What an ``Int8Tensor`` holds that a base does not: torchao's own words for some of it."""

    act_quant_kwargs: Any
    reduce_range: bool = False

    def weight(self, base: Int8) -> Tensor:
        zero = base.zero_point
        zero = torch.zeros_like(base.scale, dtype=torch.int8) if zero is None else zero
        held = {
            "zero_point": zero,
            "act_quant_scale": base.act_scale,
            "act_quant_zero_point": base.act_zero_point,
            "act_pre_scale": base.act_pre_scale,
            **self._asdict(),
        }
        known = {name: value for name, value in held.items() if name in _FIELDS}
        tensor: Tensor = Int8Tensor(
            base.qdata, base.scale, list(base.block_size), base.dtype, **known
        )
        return tensor


def empty_int8(like: Base, granularity: Any, dynamic: bool) -> Int8:
    """A base of the shape of ``like``, as ``quantize_`` of torchao makes it; codes not written."""
    shape = (like.out_features, like.in_features)
    rows, columns = get_block_size(shape, granularity)
    if columns < shape[1] and "zero_point" not in _FIELDS:
        raise ConfigError(
            "torchao 0.16 multiplies by no Int8Tensor with a scale a group. "
            "pip install 'torchao>=0.17', or take a scale a row."
        )
    kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None
    kind = torch.float32 if _WIDE_SCALES else like.dtype
    scale = torch.ones(shape[0] // rows, shape[1] // columns, device=like.device, dtype=kind)
    return Int8(
        qdata=torch.empty(shape, dtype=torch.int8, device=like.device),
        scale=scale,
        block_size=(rows, columns),
        dtype=like.dtype,
        activation=None if kwargs is None else _activation(kwargs),
        form=_Form(kwargs),
    )


def _activation(kwargs: Any) -> Activation:
    low, high = _bounds(kwargs)
    return Activation(
        per_row=type(kwargs.granularity).__name__ == "PerRow",
        asymmetric=kwargs.mapping_type == MappingType.ASYMMETRIC,
        quant_min=low,
        quant_max=high,
        wide_scale=_WIDE_SCALES,
    )


def _bounds(held: Any) -> tuple[int, int]:
    return (-64, 63) if getattr(held, "reduce_range", False) else (-128, 127)


def _read(weight: Int8Tensor, module: nn.Linear) -> Int8:
    if weight.dim() != 2:
        raise UnsupportedLayerError(
            f"An Int8Tensor of shape {tuple(weight.shape)}; fadapt adapts linears, [out, in]."
        )
    kwargs = weight.act_quant_kwargs
    activation = None if kwargs is None else _activation(kwargs)
    zero, bias = getattr(weight, "zero_point", None), module.bias
    if zero is not None and not bool(zero.any()):
        zero = None  # symmetric: torchao stores zeros, and skipping them saves a pass over W
    if activation is not None and (zero is not None or weight.block_size[1] < weight.shape[1]):
        raise UnsupportedLayerError(
            "An Int8Tensor that rounds its activations and whose weight is asymmetric or per "
            f"group (block_size {list(weight.block_size)}): torchao's own linear ignores the "
            "zero points there, and takes no groups. Quantize the weight per row, symmetrically."
        )
    act_scale = weight.act_quant_scale
    if act_scale is not None and act_scale.numel() != 1:
        raise UnsupportedLayerError(
            f"An Int8Tensor with fixed activation scales {list(act_scale.shape)}, which fit one "
            "size of batch. Calibrate with one scale for the whole activation (PerTensor)."
        )
    return Int8(
        qdata=weight.qdata.detach(),
        scale=weight.scale.detach(),
        block_size=(weight.block_size[0], weight.block_size[1]),
        dtype=weight.dtype,
        bias=None if bias is None else bias.detach(),
        zero_point=zero,
        activation=activation,
        act_scale=act_scale,
        act_zero_point=getattr(weight, "act_quant_zero_point", None),
        act_pre_scale=weight.act_pre_scale,
        bounds=_bounds(weight),
        form=_Form(kwargs, bool(getattr(weight, "reduce_range", False))),
    )


register_weight(Int8Tensor, _read)
