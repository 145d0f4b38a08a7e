"""torchao's ``Int4Tensor``: 4 bit weights by group, two a byte, weight-only.

The layout follows ``torchao/quantization/quantize_/workflows/int4/int4_tensor.py``. Its own product
is a CUDA kernel of the package mslk, which has no derivative; ours runs anywhere, without mslk. On
an H100 ours and that of mslk 1.1 are equal to a tenth of bfloat16's eps by groups of 128; by groups
of 32 mslk's is off by 9 to 22 % of the largest output, and ours is not.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.quantization import Int4Tensor

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.op import FrozenLinear
from fadapt.bases.precision import autocast_input, gemm_dtype
from fadapt.bases.protocol import register_weight
from fadapt.errors import UnsupportedLayerError


@frozen_pytree
@dataclass(frozen=True)
class Int4:
    """``W = q * scale + zero_point``, q from -8 to 7, a scale and a zero point a group of a row.

    Attributes:
        qdata: int8 ``[out, in / 2]``, the q of two neighbours of a row in a byte, the first in its
            lower half.
        scale, zero_point: ``[out, in / g]``, both in the dtype that W is dequantized to.
        form: how torchao's own tensor is made again; it has ``weight(base) -> Tensor``.
        bias: ``[out]`` or None.
        act_pre_scale: ``[in]``, multiplied into x first (AWQ), else None.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    form: Any
    bias: Tensor | None = None
    act_pre_scale: Tensor | None = None

    @property
    def in_features(self) -> int:
        return 2 * self.qdata.shape[-1]

    @property
    def out_features(self) -> int:
        return self.qdata.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def linear(self, x: Tensor) -> Tensor:
        """``W x + b``, ``[..., in] -> [..., out]`` in x's dtype."""
        x = autocast_input(x)
        if self.act_pre_scale is not None:
            x = (x * self.act_pre_scale).to(x.dtype)
        y = _op(x, (self.qdata, self.scale, self.zero_point), None)
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``, rounded once, to ``dtype`` or the base's own."""
        weight = _dequantize(self.qdata, self.scale, self.zero_point, dtype or self.dtype)
        return weight.to(dtype or self.dtype)

    def requantize(self, weight: Tensor, scales: str = "auto") -> "Int4":
        """W ``[out, in]`` on this base's grid, or on a wider one where it does not fit.

        Args:
            weight: floating ``[out, in]``.
            scales: as :meth:`fadapt.bases.int8.Int8.requantize`'s; a fresh grid spans the group
                from its smallest to its largest element, as torchao's does.
        """
        check_weight_shape(self, weight)
        base: Int4 = requantize(self, weight, scales)
        return base

    def grid(self) -> Grid:
        # In units of the scale; wide enough for on_grid to find zero_point again, to the bit.
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        zero = -self.zero_point.to(wide) / self.scale.to(wide)
        return Grid(self.scale, zero, torch.int8, -8, 7, 7.5)

    def codes(self) -> Tensor:
        return unpack(self.qdata)

    def on_grid(self, grid: Grid, codes: Tensor) -> "Int4":
        assert grid.zero is not None
        zero_point = (-grid.zero * grid.scale).to(self.dtype)
        return replace(self, qdata=pack(codes), scale=grid.scale, zero_point=zero_point)

    def rows(self, rows: slice) -> "Int4":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        return replace(
            self,
            qdata=self.qdata[rows],
            scale=self.scale[rows],
            zero_point=self.zero_point[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

    def state(self) -> dict[str, Tensor]:
        """``{"weight": ..., "bias": ...}``, a tensor of the class that was read."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": self.form.weight(self)} | bias


def pack(codes: Tensor) -> Tensor:
    """int8 ``[out, in]`` from -8 to 7, two a byte: int8 ``[out, in / 2]``."""
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def unpack(qdata: Tensor) -> Tensor:
    """The inverse of :func:`pack`."""
    low = ((qdata & 15) ^ 8) - 8  # the sign is the fourth bit
    return torch.stack([low, qdata >> 4], -1).flatten(-2)


def _dequantize(qdata: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(torch.promote_types(dtype, scale.dtype), torch.float32)
    blocks = unpack(qdata).to(wide).reshape(*scale.shape, -1)
    weight = blocks * scale.to(wide).unsqueeze(-1) + zero_point.to(wide).unsqueeze(-1)
    return weight.reshape(qdata.shape[0], -1)


def _weight(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    # Rounded to the format's dtype, as dequantize() is; then to that of the product.
    weight = _dequantize(qdata, scale, zero_point, scale.dtype).to(scale.dtype)
    return weight.to(gemm_dtype(x))


def _multiply(x: Tensor, static: Any, *weight: Tensor) -> Tensor:
    return (x.to(gemm_dtype(x)) @ _weight(x, *weight).mT).to(x.dtype)


def _transposed(g: Tensor, static: Any, *weight: Tensor) -> Tensor:
    return (g.to(gemm_dtype(g)) @ _weight(g, *weight)).to(g.dtype)


_op = FrozenLinear(_multiply, _transposed)


class _Form(NamedTuple):
    group: int
    activation_dtype: torch.dtype

    def weight(self, base: Int4) -> Tensor:
        held = {
            "act_pre_scale": base.act_pre_scale,
            # Since torchao 0.17; what is read is what its only product before was.
            "activation_dtype": self.activation_dtype,
        }
        known = {*Int4Tensor.optional_tensor_data_names}
        known |= {*getattr(Int4Tensor, "optional_tensor_attribute_names", ())}
        tensor: Tensor = Int4Tensor(
            base.qdata,
            base.scale.mT.contiguous(),
            base.zero_point.mT.contiguous(),
            [1, self.group],
            torch.Size((base.out_features, base.in_features)),
            **{name: value for name, value in held.items() if name in known},
        )
        return tensor


def _read(weight: Int4Tensor, module: nn.Linear) -> Int4:
    activation = getattr(weight, "activation_dtype", torch.bfloat16)
    if weight.dim() != 2 or weight.block_size[0] != 1 or activation != torch.bfloat16:
        raise UnsupportedLayerError(
            f"An Int4Tensor {list(weight.shape)}, block_size {list(weight.block_size)}, its "
            f"activations in {activation}: fadapt reads linears [out, in] by groups of a row, "
            "activations in bfloat16: what Int4WeightOnlyConfig() makes."
        )
    return Int4(
        qdata=weight.qdata.detach(),
        scale=weight.scale.detach().mT,
        zero_point=weight.zero_point.detach().mT,
        bias=None if module.bias is None else module.bias.detach(),
        act_pre_scale=weight.act_pre_scale,
        form=_Form(weight.block_size[1], activation),
    )


register_weight(Int4Tensor, _read)
