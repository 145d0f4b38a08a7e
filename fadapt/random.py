"""Random numbers as functions of their arguments: no global state is read or written."""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw(shape: tuple[int, ...], generator: torch.Generator, kind: str = "normal") -> Tensor:
    """float32 numbers on the generator's device: standard ``normal``, or ``uniform`` in [0, 1)."""
    fill = torch.randn if kind == "normal" else torch.rand
    return fill(shape, generator=generator, device=generator.device, dtype=torch.float32)


def dropout_seeds(generator: torch.Generator, count: int | None = None) -> Tensor:
    """Seeds for ``forward(..., dropout=...)``: int64, ``[]``, or ``[count]`` to map over.

    Example:
        >>> import torch, fadapt
        >>> fadapt.dropout_seeds(torch.Generator().manual_seed(0), 3).shape
        torch.Size([3])
    """
    shape = () if count is None else (count,)
    return torch.randint(0, 2**31, shape, generator=generator, device=generator.device)


def keep_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """A boolean mask of ``shape``, True with probability 1 - p: a pure function of ``seed``.

    Each element is a hash of (seed, its index), by the 32-bit finaliser of MurmurHash3 (Appleby,
    public domain). So a mask can be drawn again, in a checkpointed backward for instance; ``vmap``
    over seeds gives every adapter its own; and ``torch.compile`` fuses it. A generator can do none
    of the three.

    Args:
        seed: int64 ``[]``.
        shape: of the result; at most 2**32 elements.
        p: the probability of False, in [0, 1).
    """
    # Not shape.numel(), which would fix the size of an exported batch.
    index = torch.arange(math.prod(shape), device=seed.device).reshape(shape)
    bits = _mix(index ^ _mix(seed & _WORD))
    return bits >= int(p * 2**32)


def hashed_uniform(seeds: Tensor, step: int, size: int) -> Tensor:
    """float64 ``[n, size]`` in (0, 1): row i a pure function of ``seeds[i]`` and ``step``.

    By the hash of :func:`keep_mask`; the same on every device.
    """
    key = _mix(_mix(seeds & _WORD) ^ (step & _WORD))
    bits = _mix(torch.arange(size, device=seeds.device) ^ key[:, None])
    return (bits.double() + 0.5) / 2**32


def _mix(x: Tensor) -> Tensor:
    # 32-bit arithmetic inside int64; a product that wraps still has the right low 32 bits.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)
