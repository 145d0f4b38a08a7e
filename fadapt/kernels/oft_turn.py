"""OFT's rotation by what a device has for it: ``x R``, and ``x R`` straight from R's vectors."""

import torch
from torch import Tensor

from fadapt.kernels import oft_cpu
from fadapt.kernels.eager import forward_twice, oft_kernels, traced, usable
from fadapt.kernels.oft_fused import watched
from fadapt.kernels.oft_ops import Coefficients, fits, turn

LARGE = 2**16  # elements


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """``x R`` in x's dtype, for x ``[..., in]`` and blocks ``[r, b, b]``, r being ``in / b`` or 1;
    or blocks ``[k, r, b, b]``, of which each takes a kth of x's rows."""
    if forward_twice() or not fits(x, *blocks.shape[-3:-1]):
        return turn(x, blocks)
    if x.is_cpu:
        return oft_cpu.rotate(x, blocks) if _eager() else turn(x, blocks)  # type: ignore[no-any-return]
    if usable(x, blocks):
        gpu = oft_kernels()
        if gpu.takes(x, blocks):
            return gpu.rotate(x, blocks)  # type: ignore[no-any-return]
    return turn(x, blocks)


def turn_by(x: Tensor, vectors: Tensor, coefficients: Coefficients) -> Tensor | None:
    """``x R`` in x's dtype, of R's vectors ``[r, m]``; None where R is better built by itself, or
    a transform looks on that is no ``vmap``."""
    if not (_eager() if x.is_cpu else usable(x, vectors)) or watched():
        return None
    device = oft_cpu if x.is_cpu else oft_kernels()
    if not device.turns(x, vectors, coefficients):
        return None
    return device.turned(x, vectors, coefficients)  # type: ignore[no-any-return]


def large(vectors: Tensor) -> bool:
    """Whether these, all that ``vmap`` maps over, are on a CPU, which gains nothing by building R
    together with that of other layers; and a copy of them costs."""
    if not vectors.is_cpu or torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_batchedtensor(vectors):
        vectors = torch._C._functorch.get_unwrapped(vectors)
    return vectors.numel() >= LARGE


def fuses(vectors: Tensor, coefficients: Coefficients) -> bool:
    """Whether :func:`turn_by` is likely to take these on a GPU, with an input of few rows."""
    if coefficients is None or not usable(vectors, vectors) or watched():
        return False
    return oft_kernels().fuses(vectors, coefficients)  # type: ignore[no-any-return]


def _eager() -> bool:
    """On a CPU. Autocast knows plain torch alone."""
    return not traced() and not torch.is_autocast_enabled("cpu")
