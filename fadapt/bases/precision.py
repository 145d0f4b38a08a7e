"""In which dtype a frozen base multiplies: decided by what the machine can do."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fadapt.errors import AdapterError


def _cpu_gemm_dtypes() -> frozenset[torch.dtype]:
    found = {torch.float32, torch.float64}
    if torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.add(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            found.add(torch.float16)
    return frozenset(found)


# The dtypes in which this CPU multiplies matrices in hardware. For others torch falls back to a
# naive loop in the transposed product of a backward pass, 45 times slower than upcasting first
# (measured on an AVX2 machine).
CPU_GEMM_DTYPES = _cpu_gemm_dtypes()


def gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply in: x's own, or float32 where the CPU would only emulate x's."""
    if x.device.type == "cpu" and x.dtype not in CPU_GEMM_DTYPES:
        return torch.float32
    return x.dtype


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give a linear layer; x itself outside autocast.

    Raises:
        AdapterError: x is not floating: the product would be cut to integers.
    """
    if not x.is_floating_point():
        raise AdapterError(
            f"a linear layer was given an input {list(x.shape)} of {x.dtype}, and takes floating "
            "ones: x.to(the model's dtype) before it."
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, on x's device: for what must be computed in the dtype that it was given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
