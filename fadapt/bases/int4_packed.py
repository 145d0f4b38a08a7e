"""torchao's 4 bit weights that are packed for one kernel of stock torch, read as
:class:`fadapt.bases.int4.Int4`: ``Int4OpaqueTensor``, a CPU's, and ``Int4TilePackedTo4dTensor``,
of CUDA's tinygemm.

How a kernel wants its elements laid out depends on the processor, and no document of torch's says
it. But the function that packs does: given the index of each element, a digit at a time, it shows
where it puts it. A weight that was packed on another kind of processor cannot be told from one that
was packed here: its bytes mean something else to the kernel too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fadapt.bases.int4 import Int4, pack, unpack
from fadapt.errors import UnsupportedLayerError

Packer = Callable[[Tensor], Tensor]  # int32 [rows, in] from 0 to 15 -> that many nibbles
_ROWS = 64  # that are unpacked at once; every kernel's blocks of rows divide it, but the last


def read_opaque(weight: Any, module: nn.Linear) -> Int4:
    """An ``Int4OpaqueTensor``. It is packed for this processor alone, so that its integers are
    copied into the common order, ``out * in / 2`` bytes.

    Raises:
        UnsupportedLayerError: it rounds its activations, or its order cannot be found.
    """
    if getattr(weight, "act_mapping_type", None) is not None or weight.dim() != 2:
        raise UnsupportedLayerError(
            f"An Int4OpaqueTensor {list(weight.shape)} whose activations are rounded "
            f"({weight.act_mapping_type}): its weight is packed for one kernel of torchao's. For "
            "rounded activations and 4 bits take "
            "Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)."
        )
    codes = _unpacked(weight.qdata.detach(), _pack_for_cpu, *weight.shape)
    scale, zero_point = weight.scale_and_zero.detach().unbind(-1)
    return Int4(
        qdata=pack(codes.view(torch.int8) - 8),
        scale=scale.mT,
        zero_point=zero_point.mT,
        bias=None if module.bias is None else module.bias.detach(),
        act_pre_scale=weight.act_pre_scale,
        form=_Opaque(type(weight), weight.block_size[1]),
    )


class _Opaque(NamedTuple):
    kind: type  # torchao moves the class from version to version
    group: int

    def weight(self, base: Int4) -> Tensor:
        codes = unpack(base.qdata).to(torch.int32) + 8
        params = torch.stack([base.scale, base.zero_point], -1).transpose(0, 1).contiguous()
        tensor: Tensor = self.kind(
            _pack_for_cpu(codes),
            params,
            [1, self.group],
            torch.Size(codes.shape),
            act_pre_scale=base.act_pre_scale,
        )
        return tensor


def read_tile_packed(weight: Any, module: nn.Linear) -> Int4:
    """An ``Int4TilePackedTo4dTensor``: the same, where there is the CUDA that it is packed for.

    Raises:
        UnsupportedLayerError: it is on another device, or its groups do not divide its inputs.
    """
    packed, shape, group = weight.qdata.detach(), tuple(weight.shape), weight.block_size[-1]
    if packed.device.type != "cuda" or len(shape) != 2 or shape[1] % group:
        raise UnsupportedLayerError(
            f"An Int4TilePackedTo4dTensor {list(shape)} by groups of {group}, on {packed.device}: "
            "fadapt reads linears [out, in] of whole groups, on the CUDA device whose kernel "
            "(torch's tinygemm) they are packed for. Move the layer there."
        )
    # Padded to whole tiles, and tiles to 1024 inputs.
    padded = (8 * packed.shape[0], 128 * packed.shape[1])
    codes = _unpacked(packed, _pack_for_tinygemm, *padded)[: shape[0], : shape[1]]
    scale, zero_point = weight.scale_and_zero.detach().unbind(-1)
    kept = (slice(shape[1] // group), slice(shape[0]))
    return Int4(
        qdata=pack(codes.view(torch.int8) - 8),
        scale=scale[kept].mT,
        zero_point=zero_point[kept].mT,
        bias=None if module.bias is None else module.bias.detach(),
        act_pre_scale=weight.act_pre_scale,
        form=_TilePacked(type(weight), group, padded),
    )


class _TilePacked(NamedTuple):
    kind: type
    group: int
    padded: tuple[int, int]

    def weight(self, base: Int4) -> Tensor:
        codes = unpack(base.qdata).to(torch.int32) + 8
        n_out, n_in = self.padded
        params = torch.stack([base.scale, base.zero_point], -1).transpose(0, 1)
        # What pads is multiplied by zeros, or cut off.
        more = (0, n_in - codes.shape[1], 0, n_out - codes.shape[0])
        whole = (0, 0, 0, more[3], 0, n_in // self.group - params.shape[0])
        tensor: Tensor = self.kind(
            _pack_for_tinygemm(pad(codes, more)),
            pad(params, whole).contiguous(),
            [1, self.group],
            torch.Size(codes.shape),
            act_pre_scale=base.act_pre_scale,
        )
        return tensor


def _pack_for_tinygemm(codes: Tensor) -> Tensor:
    pairs = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    return packed


def _pack_for_cpu(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def _unpacked(packed: Tensor, packer: Packer, n_out: int, n_in: int) -> Tensor:
    """uint8 ``[out, in]`` from 0 to 15, of which ``packer`` makes ``packed``."""
    flat = packed.reshape(-1).view(torch.uint8)
    codes = torch.empty(n_out, n_in, dtype=torch.uint8, device=packed.device)
    places: dict[int, Tensor] = {}
    for start in range(0, n_out, _ROWS):
        part = codes[start : start + _ROWS].view(-1)
        rows = part.numel() // n_in
        if rows not in places:
            places[rows] = _places(packer, rows, n_in, packed.device)
        first = start * n_in // 2
        nibbles = _nibbles(flat[first : first + part.numel() // 2])
        torch.index_select(nibbles, 0, places[rows], out=part)
    if not torch.equal(packer(codes.to(torch.int32)), packed):
        raise UnsupportedLayerError(
            f"A 4 bit weight [{n_out}, {n_in}] that this processor's kernel does not pack by "
            f"blocks of {_ROWS} rows: fadapt cannot read it. Take IntxWeightOnlyConfig("
            "weight_dtype=torch.int4, granularity=PerGroup(32))."
        )
    return codes


def _places(packer: Packer, rows: int, n_in: int, device: torch.device) -> Tensor:
    """Of each element of ``rows`` rows: which of the packed nibbles it is."""
    index = torch.arange(rows * n_in, dtype=torch.int32, device=device).reshape(rows, n_in)
    order = torch.zeros(rows * n_in, dtype=torch.int64, device=device)
    for shift in range(0, (rows * n_in).bit_length(), 4):
        digits = packer((index >> shift) & 15).reshape(-1).view(torch.uint8)
        order |= _nibbles(digits).long() << shift
    return order.argsort()


def _nibbles(flat: Tensor) -> Tensor:
    return torch.stack([flat & 15, flat >> 4], -1).reshape(-1)
