"""float8 codes as wider floats.

On a CPU torch converts e4m3 one number at a time, which takes several times as long as a product
of 64 rows with them; here their bits are moved, many at a time.

A code ``s eeee mmm`` put into the bits of a float16, ``s 0eeee mmm0000000``, is its value over
256, subnormals included. The two NaN alone would come out as numbers: codes that hold one go
torch's way.
"""

import torch
from torch import Tensor, nn

from fadapt.bases.op import is_batched

BLOCK = 2**18  # numbers widened at a time: what is between two steps stays in the cache


def widen(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale``, multiplied in float32 and rounded once to ``dtype``.

    Args:
        codes: float8 ``[rows, columns]``, in either order of strides, which the result has too.
        scale: ``[rows, 1]``, ``[1, columns]`` or ``[1, 1]``.
        dtype: of the result; for float64 the product is taken in it.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if wide == torch.float64 or not _movable(codes, scale):
        return (codes.to(wide) * scale.to(wide)).to(dtype)
    if codes.stride(-1) != 1 and codes.stride(-2) == 1:
        return widen(codes.mT, scale.mT, dtype).mT
    rows = max(1, BLOCK // codes.shape[1])
    out = torch.empty(codes.shape, dtype=dtype)
    bits = torch.empty(min(rows, len(codes)), codes.shape[1], dtype=torch.int16)
    floats = None if dtype == wide else torch.empty(bits.shape, dtype=wide)
    tall = scale.shape[0] == 1
    scale = scale.to(wide) * 256.0
    for start in range(0, len(codes), rows):
        part = out[start : start + rows]
        moved = bits[: len(part)].copy_(codes[start : start + rows].view(torch.int8))
        moved.bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign came along twice
        values = part if floats is None else floats[: len(part)]
        values.copy_(moved.view(torch.float16))
        values.mul_(scale if tall else scale[start : start + rows])
        if floats is not None:
            part.copy_(values)
    return out


def _movable(codes: Tensor, scale: Tensor) -> bool:
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu" or not codes.numel():
        return False
    if torch.compiler.is_compiling() or not all(map(_is_plain, (codes, scale))):
        return False
    return int(codes.view(torch.int8).bitwise_and(0x7F).amax()) < 0x7F


def _is_plain(tensor: Tensor) -> bool:
    """Neither differentiated, nor mapped over, nor traced: a number can be read out of it."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.requires_grad:
        return False
    return not is_batched(tensor) and not torch._C._len_torch_dispatch_stack()
