"""torchao's ``IntxUnpackedToInt8Tensor``: weights of 1 to 8 bits by row or group, held as
int8; weight-only, or with the activations rounded to int8 a token.

The numbers follow ``intx/intx_unpacked_to_int8_tensor.py`` under
``torchao/quantization/quantize_/workflows``: both roundings are undone before a floating product.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.int8_product import dequantize, scaled
from fadapt.bases.op import FrozenLinear
from fadapt.bases.precision import autocast_input, gemm_dtype
from fadapt.bases.protocol import Base, register_weight
from fadapt.errors import UnsupportedLayerError


@frozen_pytree
@dataclass(frozen=True)
class Intx:
    """``W = (qdata - zero_point) * scale``.

    Attributes:
        qdata: int8 ``[out, in]``, within the range of ``bits`` bits.
        scale: ``[out / b0, in / b1]`` for blocks of ``b0 x b1``.
        block_size: ``(1, g)`` or ``(1, in)``, or ``(out, in)``.
        bits: 1 to 8.
        dtype: the float dtype that W is dequantized to.
        bias: ``[out]`` or None.
        zero_point: like ``scale``, or None for all zeros.
        rounds: the activation is rounded to int8 a token.
        wide_scale: then by a float32 scale, whatever x's dtype.
        form: how torchao's own tensor is made again: it has ``weight(base) -> Tensor``. None for
            the weight-only tensor of its newest class.
    """

    qdata: Tensor
    scale: Tensor
    block_size: tuple[int, int]
    bits: int
    dtype: torch.dtype
    bias: Tensor | None = None
    zero_point: Tensor | None = None
    rounds: bool = False
    wide_scale: bool = False
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
        rounding, where there is one.
        """
        x = autocast_input(x)
        zero = () if self.zero_point is None else (self.zero_point,)
        weight = (self.qdata, self.scale, *zero)
        if not self.rounds:
            y = _op(x, weight, self.dtype)
        else:
            flat = _round_activation(x.detach(), self.wide_scale)
            if torch.compiler.is_compiling():
                # What is compiled is differentiated through the body: round on the way in.
                y = _op(x + (flat - x.detach()), weight, self.dtype)
            else:
                y = _op.straight_through(x, (flat,), weight, self.dtype)
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``; in the base's own dtype bit for bit torchao's ``dequantize``."""
        return dequantize(self.qdata, self.scale, self.zero_point, dtype or self.dtype)

    def requantize(self, weight: Tensor, scales: str = "auto") -> "Intx":
        """W ``[out, in]`` on this base's grid, or on a wider one where it does not fit.

        Args:
            weight: floating ``[out, in]``.
            scales: as :meth:`fadapt.bases.int8.Int8.requantize`'s.
        """
        check_weight_shape(self, weight)
        base: Intx = requantize(self, weight, scales)
        return base

    def grid(self) -> Grid:
        half = 2 ** (self.bits - 1)
        span = (2 * half - 1) / 2
        return Grid(self.scale, self.zero_point, torch.int8, -half, half - 1, span)

    def codes(self) -> Tensor:
        return self.qdata

    def on_grid(self, grid: Grid, codes: Tensor) -> "Intx":
        return replace(self, qdata=codes, scale=grid.scale, zero_point=grid.zero)

    def rows(self, rows: slice) -> "Intx":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        tall = self.block_size[0] > 1
        zero = self.zero_point
        qdata = self.qdata[rows]
        return replace(
            self,
            qdata=qdata,
            block_size=(len(qdata), self.in_features) if tall else self.block_size,
            scale=self.scale if tall else self.scale[rows],
            zero_point=zero if tall or zero is None else zero[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

    def state(self) -> dict[str, Tensor]:
        """``{"weight": ..., "bias": ...}``, a tensor of the class that was read, which torchao runs
        as it is."""
        bias = {} if self.bias is None else {"bias": self.bias}
        form = _Form(None) if self.form is None else self.form
        return {"weight": form.weight(self)} | bias


class _Form(NamedTuple):
    activation: Any  # torchao's name for how the activation is rounded; None for weight-only

    def weight(self, base: Intx) -> Tensor:
        zero = base.zero_point
        tensor: Tensor = IntxUnpackedToInt8Tensor(
            base.qdata,
            base.scale,
            torch.zeros_like(base.scale, dtype=torch.int8) if zero is None else zero,
            getattr(torch, f"int{base.bits}"),
            base.block_size,
            base.dtype,
            self.activation,
        )
        return tensor


def empty_intx(like: Base, bits: int, group: int) -> Intx:
    """A base of the shape of ``like``, symmetric, as ``quantize_`` of torchao makes it; its codes
    are not written."""
    shape = (like.out_features, like.in_features)
    return Intx(
        qdata=torch.empty(shape, dtype=torch.int8, device=like.device),
        scale=torch.ones(shape[0], shape[1] // group, dtype=like.dtype, device=like.device),
        block_size=(1, group),
        bits=bits,
        dtype=like.dtype,
    )


def _multiply(x: Tensor, dtype: torch.dtype, qdata: Tensor, *scales: Tensor) -> Tensor:
    weight = scaled(qdata, scales[0], scales[1] if len(scales) > 1 else None, dtype)
    compute = gemm_dtype(x)
    return (x.to(compute) @ weight.to(compute).mT).to(x.dtype)


def _transposed(g: Tensor, dtype: torch.dtype, qdata: Tensor, *scales: Tensor) -> Tensor:
    weight = scaled(qdata, scales[0], scales[1] if len(scales) > 1 else None, dtype)
    compute = gemm_dtype(g)
    return (g.to(compute) @ weight.to(compute)).to(g.dtype)


def _rounded(x: Tensor, dtype: torch.dtype, flat: Tensor, *weight: Tensor) -> Tensor:
    return _multiply(flat.to(x.dtype), dtype, *weight)


def _round_activation(x: Tensor, wide_scale: bool) -> Tensor:
    """x ``[..., in]`` rounded to int8 a token, with a zero point, and back, in its own dtype."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    eps = torch.finfo(torch.float32 if wide_scale else x.dtype).eps
    scale = ((high - low) / 255.0).clamp(min=eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    if wide_scale:
        scale = scale.float()
    steps = ((x * (1.0 / scale)).round() + zero).clamp(-128, 127)
    return ((steps - zero) * scale).to(x.dtype)


_op = FrozenLinear(_multiply, _transposed, rounded=_rounded, n_aux=1)


def _read(weight: IntxUnpackedToInt8Tensor, module: nn.Linear) -> Intx:
    if weight.dim() != 2:
        raise UnsupportedLayerError(
            f"An IntxUnpackedToInt8Tensor {list(weight.shape)}; fadapt adapts linears, [out, in]."
        )
    zero = weight.zero_point
    return Intx(
        qdata=weight.qdata.detach(),
        scale=weight.scale.detach(),
        block_size=(weight.block_size[0], weight.block_size[1]),
        bits=int(str(weight.target_dtype).removeprefix("torch.int")),
        dtype=weight.dtype,
        bias=None if module.bias is None else module.bias.detach(),
        zero_point=zero.detach() if bool(zero.any()) else None,
        rounds=weight.activation_quantization is not None,
        form=_Form(weight.activation_quantization),
    )


register_weight(IntxUnpackedToInt8Tensor, _read)
