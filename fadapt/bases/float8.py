"""torchao's ``Float8Tensor`` (0.18): float8 weights by row or tensor; weight-only, or with the
activations rounded to float8 on the fly (dynamic).

The numbers follow ``torchao/quantization/quantize_/workflows/float8/float8_tensor.py``. torchao's
dynamic form asserts on a CPU; here it is plain torch there, and ``torch._scaled_mm`` on a GPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Float8Tensor

from fadapt._pytree import frozen_pytree
from fadapt.bases import fp8
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.precision import autocast_input
from fadapt.bases.protocol import Base, register_weight
from fadapt.errors import UnsupportedLayerError


@dataclass(frozen=True, slots=True)
class Activation:
    """How the activation is rounded: the float8 dtype, a scale a token or one, bounds of amax."""

    kind: torch.dtype
    per_row: bool
    low: float | None
    high: float | None


@frozen_pytree
@dataclass(frozen=True)
class Float8:
    """``W = qdata * scale``.

    Attributes:
        qdata: float8 ``[out, in]``.
        scale: float32 ``[out, 1]`` (per row) or ``[1, 1]`` (per tensor).
        dtype: the float dtype the weight was quantized from, and is dequantized to.
        bias: ``[out]`` or None.
        activation: None for weight-only.
        settings: torchao's own, to write W back with.
    """

    qdata: Tensor
    scale: Tensor
    dtype: torch.dtype
    bias: Tensor | None = None
    activation: Activation | None = None
    settings: tuple[tuple[str, Any], ...] = ()

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
        weight = (self.qdata, self.scale)
        if self.activation is None:
            y = fp8.op(x, weight, fp8.Format(self.dtype, x.dtype))
        else:
            kind = self.activation.kind
            one = not self.activation.per_row
            # torch._scaled_mm wants rows of 16 bytes, and both scales of one kind.
            native = self.device.type == "cuda" and not (self.in_features % 16) | (
                self.out_features % 16
            )
            static = fp8.Format(torch.float32, x.dtype, scaled=native, one=one)
            how = fp8.Rounding(kind, torch.finfo(kind).max, x.dtype)
            y = fp8.rounded_product(x, self._scale(x.detach()), how, weight, static)
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``; in the base's own dtype bit for bit ``Float8Tensor.dequantize``."""
        return fp8.dequantize(self.qdata, self.scale, dtype or self.dtype)

    def requantize(self, weight: Tensor, scales: str = "auto") -> "Float8":
        """W ``[out, in]`` on this base's grid, or on a wider one where it does not fit.

        Args:
            weight: floating ``[out, in]``.
            scales: as :meth:`fadapt.bases.int8.Int8.requantize`'s; a fresh one is amax / 448.
        """
        check_weight_shape(self, weight)
        base: Float8 = requantize(self, weight, scales)
        return base

    def grid(self) -> Grid:
        return fp8.grid(self.scale, self.qdata.dtype, torch.finfo(self.qdata.dtype).max)

    def codes(self) -> Tensor:
        return self.qdata

    def on_grid(self, grid: Grid, codes: Tensor) -> "Float8":
        return replace(self, qdata=codes, scale=grid.scale)

    def rows(self, rows: slice) -> "Float8":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        return replace(
            self,
            qdata=self.qdata[rows],
            scale=self.scale if self.scale.shape[0] == 1 else self.scale[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

    def state(self) -> dict[str, Tensor]:
        """``{"weight": Float8Tensor, "bias": ...}``, which torchao runs as it is."""
        tall = self.scale.shape[0] == 1 and self.out_features > 1
        block = [self.out_features if tall else 1, self.in_features]
        weight = Float8Tensor(
            self.qdata, self.scale, block_size=block, dtype=self.dtype, **dict(self.settings)
        )
        return {"weight": weight} | ({} if self.bias is None else {"bias": self.bias})

    def _scale(self, x: Tensor) -> Tensor:
        how = self.activation
        assert how is not None
        over = (-1,) if how.per_row else tuple(range(x.dim()))
        amax = x.abs().amax(over, keepdim=True)
        if how.low is not None or how.high is not None:
            amax = amax.clamp(how.low, how.high)
        scale = (amax / torch.finfo(how.kind).max).float()
        # torchao divides a row of zeros by zero; any scale gives zeros.
        return torch.where(scale > 0, scale, 1.0)


def empty_float8(like: Base) -> Float8:
    """A base of the shape of ``like``, as ``quantize_`` of torchao makes it; codes not written."""
    shape = (like.out_features, like.in_features)
    return Float8(
        qdata=torch.empty(shape, dtype=torch.float8_e4m3fn, device=like.device),
        scale=torch.ones(shape[0], 1, device=like.device),
        dtype=like.dtype,
    )


def _read(weight: Float8Tensor, module: nn.Linear) -> Float8:
    tall = list(weight.block_size or []) in ([], list(weight.shape))
    if weight.dim() != 2 or not (tall or list(weight.block_size) == [1, weight.shape[1]]):
        raise UnsupportedLayerError(
            f"A Float8Tensor {list(weight.shape)} with blocks {weight.block_size}: fadapt reads "
            "[out, in] with a scale a row or one for the tensor. Quantize with PerRow() or "
            "PerTensor()."
        )
    kwargs = weight.act_quant_kwargs
    activation = None
    if kwargs is not None:
        activation = Activation(
            kwargs.float8_dtype,
            type(kwargs.granularity).__name__ == "PerRow",
            kwargs.hp_value_lb,
            kwargs.hp_value_ub,
        )
    return Float8(
        qdata=weight.qdata.detach(),
        scale=weight.scale.detach().reshape(-1, 1),
        dtype=weight.dtype,
        bias=None if module.bias is None else module.bias.detach(),
        activation=activation,
        settings=(
            ("mm_config", weight.mm_config),
            ("act_quant_kwargs", kwargs),
            ("kernel_preference", weight.kernel_preference),
        ),
    )


register_weight(Float8Tensor, _read)
