"""Linears of torchao's 4 bit classes. ``Int4Tensor.from_hp`` needs the package mslk, for CUDA: here
its integers, scales and zero points are made by the formulas of ``mslk/quantize/shuffle.py``
(``int4_row_quantize_zp``, ``pack_int4``), and given to the class's own constructor."""

from importlib import import_module

import torch
from torch import Tensor, nn
from torchao.quantization import Int4Tensor, Int4TilePackedTo4dTensor
from torchao_int8 import VERSION


def int4(layer: nn.Linear, group: int = 4) -> nn.Linear:
    weight = layer.weight.detach()
    blocks = weight.float().unflatten(-1, (-1, group))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = (high - low).clamp(min=1e-6) / 15
    steps = ((blocks - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15) - 8
    q = steps.flatten(-2).to(torch.int8)
    layer.weight = nn.Parameter(
        Int4Tensor(
            (q[:, ::2] & 0xF) | (q[:, 1::2] << 4),
            scale.mT.contiguous().to(weight.dtype),
            (low + 8 * scale).mT.contiguous().to(weight.dtype),
            [1, group],
            weight.shape,
        ),
        requires_grad=False,
    )
    return layer


def int4_weight(layer: nn.Linear) -> Tensor:
    """W of it in float64, element by element."""
    held = layer.weight
    group = held.block_size[1]
    out = torch.empty(held.shape, dtype=torch.float64)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            byte = int(held.qdata[i, j // 2]) & 0xFF
            nibble = byte >> 4 if j % 2 else byte & 0xF
            q = nibble - 16 if nibble > 7 else nibble
            out[i, j] = q * held.scale[j // group, i].double() + held.zero_point[j // group, i]
    return out


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``x W^T + b`` in float64, in x's dtype."""
    weight = int4_weight(layer).to(x.device)
    return (x.double() @ weight.mT + layer.bias.double()).to(x.dtype)


def tile_packed(layer: nn.Linear, group: int = 32) -> nn.Linear:
    """On CUDA. Padded to 1024 inputs and to 8 outputs."""
    layer = layer.cuda()
    weight = Int4TilePackedTo4dTensor.from_hp(layer.weight.detach(), [1, group])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def opaque(layer: nn.Linear, group: int = 32) -> nn.Linear:
    where = "quantization.int4.int4_opaque_tensor"
    if VERSION < (0, 17):
        where = "int4_opaque_tensor.int4_opaque_tensor"
    kind = import_module(f"torchao.prototype.{where}").Int4OpaqueTensor
    weight = kind.from_hp(layer.weight.detach(), [1, group])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
