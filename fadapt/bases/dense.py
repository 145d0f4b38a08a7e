"""A dense base: the weight is a plain floating-point tensor."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fadapt._pytree import frozen_pytree
from fadapt.bases.grid import Grid
from fadapt.bases.op import FrozenLinear
from fadapt.bases.precision import autocast_input, gemm_dtype
from fadapt.bases.protocol import Base, register_weight
from fadapt.errors import AdapterError, UnsupportedLayerError


@frozen_pytree
@dataclass(frozen=True)
class Dense:
    """``W x + b`` with W as it is.

    Attributes:
        weight: ``[out, in]``, floating.
        bias: ``[out]`` or None.
        transposed: the layer stores W as ``[in, out]`` (transformers' ``Conv1D``); ``weight`` is
            then a view of it.
    """

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def linear(self, x: Tensor) -> Tensor:
        """``W x + b``, ``[..., in] -> [..., out]``; the very call that ``nn.Linear`` makes, except
        on a CPU without a GEMM of x's dtype, where it multiplies in float32."""
        if self.transposed:
            return _conv1d(x, self.weight, self.bias)
        if x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        low = autocast_input(x)
        if gemm_dtype(low) == low.dtype:
            return F.linear(x, self.weight, self.bias)
        y = _op(low, (self.weight,), None)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``; shares the layer's storage unless ``dtype`` differs."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def requantize(self, weight: Tensor) -> "Dense":
        """The same with another W ``[out, in]``, rounded to this base's dtype."""
        check_weight_shape(self, weight)
        return replace(self, weight=weight.to(self.dtype))

    def grid(self) -> Grid:
        return Grid(self.weight.new_ones(1, 1), None, self.dtype, -math.inf, math.inf, None)

    def codes(self) -> Tensor:
        return self.weight

    def on_grid(self, grid: Grid, codes: Tensor) -> "Dense":
        return replace(self, weight=codes)

    def rows(self, rows: slice) -> "Dense":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias)

    def state(self) -> dict[str, Tensor]:
        """``{"weight": ..., "bias": ...}`` as the layer stores them."""
        weight = self.weight.mT.contiguous() if self.transposed else self.weight
        return {"weight": weight} | ({} if self.bias is None else {"bias": self.bias})


def check_weight_shape(base: Base, weight: Tensor) -> None:
    """Raise AdapterError unless ``weight`` is ``[out, in]`` of this base."""
    expected = (base.out_features, base.in_features)
    if tuple(weight.shape) != expected:
        raise AdapterError(
            f"requantize() was given a weight of shape {tuple(weight.shape)}; this "
            f"{type(base).__name__} holds {expected} ([out_features, in_features])."
        )


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The call that transformers' Conv1D makes, so that the result is the same bit for bit.
    if bias is None:
        return x @ weight.mT
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.mT)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def _multiply(x: Tensor, static: None, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


def _transposed(g: Tensor, static: None, weight: Tensor) -> Tensor:
    return (g.float() @ weight.float()).to(g.dtype)


_op = FrozenLinear(_multiply, _transposed)


def check_plain(weight: Tensor, what: str) -> None:
    """Raise UnsupportedLayerError unless ``weight``, of a ``what``, is plain floats."""
    # Exact types: an unknown tensor subclass may hold its numbers in a format of its own.
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise UnsupportedLayerError(
            f"An {what} whose weight is a {type(weight).__module__}.{type(weight).__qualname__} "
            f"of dtype {weight.dtype} is not supported. Supported: plain floating tensors, and in "
            "an nn.Linear torchao 0.18's Int8Tensor, Float8Tensor and IntxUnpackedToInt8Tensor."
        )
    if weight.element_size() < 2:
        raise UnsupportedLayerError(
            f"An {what} with a bare {weight.dtype} weight has no scale that fadapt could read. "
            "Quantize with torchao or INC, whose layers carry their scales."
        )


def _read(weight: Tensor, module: nn.Linear) -> Dense:
    check_plain(weight, "nn.Linear")
    bias = module.bias
    return Dense(weight.detach(), None if bias is None else bias.detach())


register_weight(Tensor, _read)
