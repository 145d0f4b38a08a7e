"""When a Triton kernel may stand in for plain torch, and its launch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    import triton
except ImportError:  # torch for CUDA brings it, torch for CPUs does not
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_functorch = torch._C._functorch


def runs(x: Tensor) -> bool:
    """Whether the body of an op may hand ``x``, and what is frozen beside it, to a Triton kernel.

    Not while compiling, whose graph must be plain torch; not under the older vmap; and not where a
    dispatch mode looks on (``make_fx``, ``FlopCounterMode``), which would not see a kernel.
    """
    return (
        triton is not None
        and x.is_cuda
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not _functorch.is_functorch_wrapped_tensor(x)
        and not _functorch.is_legacy_batchedtensor(x)
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4) -> None:
    """``kernel[grid](*args)`` on the device of the first argument, which need not be the current
    one."""
    device = args[0].get_device()
    if device == torch.cuda.current_device():
        kernel[grid](*args, num_warps=warps)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, num_warps=warps)
