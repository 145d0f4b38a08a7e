"""When a Triton kernel may be part of the body of a frozen base's op, and its launch."""

from typing import Any

import torch
from torch import Tensor

from fadapt.kernels.eager import readable, usable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs(x: Tensor) -> bool:
    """Whether the body of an op may hand ``x``, and what is frozen beside it, to a Triton kernel:
    one can run here, and x is no wrapper of a transform."""
    return usable(x, x) and readable(x)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4) -> None:
    """``kernel[grid](*args)`` on the device of the first argument, which need not be the current
    one."""
    device = args[0].get_device()
    if device == torch.cuda.current_device():
        kernel[grid](*args, num_warps=warps)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, num_warps=warps)
