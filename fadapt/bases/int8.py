"""torchao's ``Int8Tensor``: int8 weights by row, tensor or group; weight-only, or with activations
rounded to int8 on the fly (dynamic) or by fixed scales (static).

The numbers follow ``torchao/quantization/quantize_/workflows/int8/int8_tensor.py``; those of the
older ``AffineQuantizedTensor`` (see affine.py) differ as :class:`Activation` and ``by_value`` say.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
from torchao.quantization.utils import get_block_size

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.op import FrozenLinear, is_batched
from fadapt.bases.precision import autocast_input, gemm_dtype
from fadapt.bases.protocol import Base, register_weight
from fadapt.errors import ConfigError, UnsupportedLayerError

# What this torchao's Int8Tensor holds: zero points since 0.17, a reduced range since 0.18.
_FIELDS = {*Int8Tensor.optional_tensor_data_names, *Int8Tensor.optional_tensor_attribute_names}
_WIDE_SCALES = "reduce_range" in _FIELDS  # float32, since 0.18; before, of what is quantized


class Activation(NamedTuple):
    """How the activation is rounded to int8 before the product; the range is symmetric round 0."""

    per_row: bool  # a scale a token, or one for the whole tensor
    asymmetric: bool  # with a zero point
    quant_min: int  # -128, or -64 where torchao's reduce_range is set; -127 in the older tensor
    quant_max: int
    wide_scale: bool = _WIDE_SCALES  # a float32 scale, or one in x's dtype
    eps: float = torch.finfo(torch.float32).eps  # the smallest scale
    # The product is rounded to the output's dtype before it is scaled by row; or, in the older
    # tensor, to the activation scale's, which is float32 for a float16 x.
    early: bool = True


@dataclass(frozen=True, slots=True)  # not a NamedTuple, which vmap would take apart at every call
class _Format:
    dtype: torch.dtype  # that W is dequantized to
    result: torch.dtype | None  # to round the product to, or None for that of its scale
    by_value: bool
    asymmetric: bool  # the activation's zero point is not always 0


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
        static = _Format(
            self.dtype,
            dtype if self.activation is None or self.activation.early else None,
            by_value=self.by_value or self.block_size[1] < self.in_features,
            asymmetric=self.activation is not None and self.activation.asymmetric,
        )
        zero_point = () if self.zero_point is None else (self.zero_point,)
        weight = (self.qdata, self.scale, *zero_point)
        if self.activation is None:
            y = _op(x, weight, static).to(dtype)
        else:
            # torchao's scale is float32: the product stays so until the bias has been added.
            wide = x.to(torch.promote_types(x.dtype, self.scale.dtype))
            aux = _round_activation(x.detach(), self)
            if _exports_integers(x):
                y = _dynamic(wide, static, *aux, *weight)
            elif torch.compiler.is_compiling():
                # What is compiled is differentiated through the body, and an integer product has
                # no derivative: multiply the rounded activation, straight through the rounding.
                rounded, scale, zero = aux
                flat = (rounded.to(wide.dtype) - zero.to(wide.dtype)) * scale.to(wide.dtype)
                y = _op(wide + (flat - wide.detach()), weight, static)
            else:
                y = _op.straight_through(wide, aux, weight, static)
        return (y if self.bias is None else y + self.bias).to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``, bit for bit torchao's ``Int8Tensor.dequantize``."""
        return _dequantize(self.qdata, self.scale, self.zero_point, dtype or self.dtype)

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


def _blocks(values: Tensor, scale: Tensor) -> Tensor:
    """``[out, in]`` seen as ``[*scale.shape, elements of a block]``."""
    if scale.shape[0] == 1 and values.shape[0] != 1:
        return values.reshape(1, 1, -1)
    return values.reshape(*scale.shape, -1)


def _dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # torchao's order of rounding: the integer in the output dtype, then times the scale.
    blocks = _blocks(qdata.to(dtype), scale)
    if zero_point is not None:
        blocks = blocks - zero_point.to(dtype).unsqueeze(-1)
    return (blocks * scale.unsqueeze(-1)).to(dtype).reshape(qdata.shape)


def scaled(
    qdata: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What a product multiplies by: W, or without a scale the codes, in one pass on a GPU."""
    if qdata.is_cuda and not torch.compiler.is_compiling():
        from fadapt.kernels import scaled_gpu

        if scaled_gpu.usable(qdata, scale, zero_point, dtype):
            return scaled_gpu.dequantize(qdata, scale, zero_point, dtype)
    return qdata.to(dtype) if scale is None else _dequantize(qdata, scale, zero_point, dtype)


def _multiply(
    x: Tensor, static: _Format, qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    compute = gemm_dtype(x)
    if static.by_value or zero_point is not None:
        weight = scaled(qdata, scale, zero_point, static.dtype)
        return (x.to(compute) @ weight.to(compute).mT).to(x.dtype)
    return _product(x.to(compute), qdata, 0).mul_(scale.to(compute).flatten()).to(x.dtype)


def _transposed(
    g: Tensor, static: _Format, qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    compute = gemm_dtype(g)
    if static.by_value or zero_point is not None:
        weight = scaled(qdata, scale, zero_point, static.dtype)
        return (g.to(compute) @ weight.to(compute)).to(g.dtype)
    return _product(g.to(compute) * scale.to(compute).flatten(), qdata, 1).to(g.dtype)


def _product(x: Tensor, qdata: Tensor, dim: int) -> Tensor:
    """``x @ qdata.T`` (dim 0) or ``x @ qdata`` (dim 1), qdata cast to x's dtype.

    On a CPU in eager mode a large W is cast a block at a time, into one buffer: no large buffer is
    allocated, faulted in and given back at every call. Of few rows, the product is short, and so is
    the block, to stay in the cache between cast and product; of many, short blocks cost more than
    they save (both measured on 1024 x 1024 and 2048 x 2048, in float32 and bfloat16).
    """
    whole = qdata.device.type != "cpu" or torch.compiler.is_compiling() or is_batched(x)
    if not whole:
        rows = x.reshape(-1, x.shape[-1])
        limit = 2**20 if rows.shape[0] < 64 else 2**24
        whole = qdata.numel() * x.element_size() <= 2 * limit
    if whole:
        weight = scaled(qdata, None, None, x.dtype)
        return x @ (weight.mT if dim == 0 else weight)
    blocks = qdata.split(max(32, limit // (qdata.shape[1 - dim] * rows.element_size())), dim)
    buffer = torch.empty_like(blocks[0], dtype=rows.dtype, memory_format=torch.contiguous_format)
    product = rows.new_empty(rows.shape[0], qdata.shape[dim])
    start = 0
    for block in blocks:
        size = block.shape[dim]
        cast = buffer.narrow(dim, 0, size).copy_(block)
        part = product.narrow(1, start, size)
        torch.mm(rows, cast.mT if dim == 0 else cast, out=part)
        start += size
    return product.reshape(*x.shape[:-1], qdata.shape[dim])


def _round_activation(x: Tensor, base: Int8) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[..., in]`` as int8, with its scale and zero point, each ``[..., 1]``."""
    kind = base.activation
    assert kind is not None
    if base.act_scale is not None:
        scale = base.act_scale.reshape(-1)[:1]
        zero = torch.zeros_like(scale) if base.act_zero_point is None else base.act_zero_point
        zero = zero.reshape(-1)[:1]
    else:
        over = (-1,) if kind.per_row else tuple(range(x.dim()))
        low = x.amin(over, keepdim=True).clamp(max=0)
        high = x.amax(over, keepdim=True).clamp(min=0)
        span = kind.quant_max - kind.quant_min
        if kind.asymmetric:
            scale = ((high - low) / span).clamp(min=kind.eps)
            zero = (kind.quant_min - (low / scale).round()).clamp(kind.quant_min, kind.quant_max)
        else:
            scale = (torch.maximum(-low, high) / (span / 2)).clamp(min=kind.eps)
            zero = torch.zeros_like(scale)
        if kind.wide_scale or (not kind.early and x.dtype == torch.float16):
            scale = scale.float()
    steps = (x * (1.0 / scale)).round() + zero
    rounded = steps.clamp(kind.quant_min, kind.quant_max).to(torch.int8)
    rows = (*x.shape[:-1], 1)
    return rounded, scale.expand(rows), zero.to(torch.int8).expand(rows)


def _exports_integers(x: Tensor) -> bool:
    """Whether a graph is exported for inference: without gradients there is nothing to lose."""
    return (
        torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and x.device.type == "cpu"  # elsewhere _int_mm takes some sizes alone
    )


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 ``a [m, k]`` times int8 ``b [n, k]`` transposed, exactly, as int32 or float64."""
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    usable = a.device.type == "cpu" or (k % 8 == 0 and n % 8 == 0)
    if usable and not is_batched(a):
        if a.device.type == "cpu" or m > 16:
            return torch._int_mm(a.contiguous(), b.t())
        return torch._int_mm(F.pad(a, (0, 0, 0, 32 - m)), b.t())[:m]  # cuBLAS: 17 rows or more
    return a.double() @ b.double().t()  # exact too: |sum| < 2**53


def _dynamic(
    x: Tensor,
    static: _Format,
    rounded: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    qdata: Tensor,
    scale: Tensor,
) -> Tensor:
    rows = rounded.reshape(-1, rounded.shape[-1])
    x_scale = x_scale.reshape(-1, 1)
    result = static.result or x_scale.dtype
    if x_scale.dtype == torch.float16:  # whose range the sums may leave
        x_scale = x_scale.float()
    # int8_tensor.py: scaled in the scale's dtype, rounded to the result's, then the weight's scale.
    y = (_int_matmul(rows, qdata).to(x_scale.dtype) * x_scale).to(result)
    if static.asymmetric:
        sums = qdata.sum(-1).to(x_scale.dtype)
        y = y - ((x_zero.reshape(-1, 1).to(x_scale.dtype) * x_scale) * sums).to(result)
    return (y * scale.flatten()).to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


_op = FrozenLinear(_multiply, _transposed, rounded=_dynamic, n_aux=3)


def _activation(kwargs: Any) -> Activation:
    low, high = _bounds(kwargs)
    return Activation(
        per_row=type(kwargs.granularity).__name__ == "PerRow",
        asymmetric=kwargs.mapping_type == MappingType.ASYMMETRIC,
        quant_min=low,
        quant_max=high,
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
