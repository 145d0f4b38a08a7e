"""A dense convolution in 1, 2 or 3 dimensions: a linear map of the patches of its input."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import Dense, check_plain, check_weight_shape
from fadapt.bases.grid import Grid
from fadapt.bases.protocol import register_base
from fadapt.errors import UnsupportedLayerError

SLIDE: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@frozen_pytree
@dataclass(frozen=True)
class Conv(Dense):
    """``W * x + b``. Its matrix W is ``[out_channels, in_channels x kernel]``.

    Attributes:
        weight: as the layer holds it, ``[out, in, *kernel]``.
        bias: ``[out]`` or None.
        stride, dilation: one a dimension.
        padding: one a dimension, or ``"same"``, ``"valid"``.
        mode: what the input is padded with, as ``nn.Conv2d``'s ``padding_mode``.
        around: of a mode other than zeros, the sizes that ``F.pad`` takes.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    mode: str = "zeros"
    around: tuple[int, ...] = ()

    @property
    def patch(self) -> torch.Size:
        """What one output sees: ``[in, *kernel]``."""
        return self.weight.shape[1:]

    @property
    def in_features(self) -> int:
        """The size of a patch."""
        return self.patch.numel()

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def linear(self, x: Tensor) -> Tensor:
        """``[n, in, *size] -> [n, out, *size']``, n left out or not; the call that the layer
        makes."""
        return self.slide(x, self.weight, self.bias)

    def slide(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with another weight ``[r, in, *kernel]`` by this layer's stride, padding and
        dilation."""
        padding: Any = self.padding
        if self.mode != "zeros":
            x, padding = F.pad(x, self.around, mode=self.mode), 0
        y: Tensor = SLIDE[weight.dim()](x, weight, bias, self.stride, padding, self.dilation)
        return y

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in x kernel]``."""
        flat = self.weight.flatten(1)
        return flat if dtype is None else flat.to(dtype)

    def requantize(self, weight: Tensor) -> "Conv":
        """The same with another W ``[out, in x kernel]``, rounded to this base's dtype."""
        check_weight_shape(self, weight)
        return replace(self, weight=weight.to(self.dtype).reshape(self.weight.shape))

    def codes(self) -> Tensor:
        return self.weight.flatten(1)

    def on_grid(self, grid: Grid, codes: Tensor) -> "Conv":
        return replace(self, weight=codes.reshape(self.weight.shape))


def _read(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Conv:
    kind: Any = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.forward not in _FORWARDS:
        raise UnsupportedLayerError(
            f"{name} is a convolution with a forward of its own, which fadapt cannot assume to be "
            "W * x + b. Leave it out of the targets (exclude=)."
        )
    if module.groups != 1:
        raise UnsupportedLayerError(
            f"this {name} has groups={module.groups}: an update of low rank mixes all of its "
            "inputs, which a kernel in groups cannot hold, so that it could never be merged. "
            "Leave it out of the targets (exclude=), or train it whole (modules_to_save=)."
        )
    check_plain(module.weight, name)
    bias = module.bias
    return Conv(
        module.weight.detach(),
        None if bias is None else bias.detach(),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        mode=module.padding_mode,
        around=tuple(module._reversed_padding_repeated_twice),
    )


for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_base(_kind, _read)
