"""DoRA's norms on a GPU, in Triton: nothing as large as W is written.

The plain torch that this must equal is :meth:`fadapt.DoRA.norm`.
"""

import torch
from torch import Tensor

from fadapt.kernels import dora_triton
from fadapt.kernels.eager import launch

MOST_RANK = 64
_TALL = 32  # rows of W a program


def takes(A: Tensor, B: Tensor) -> bool:
    """Whether :func:`row_norms` takes these, if Triton does."""
    return A.dtype == B.dtype != torch.float64 and A.shape[0] <= MOST_RANK


def row_norms(weight: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``|W + s B A|`` of each row, float32 ``[rows]``, from W ``[rows, in]``, its rows' ``|W|^2``
    ``[rows]``, A ``[r, in]`` and B ``[rows, r]``."""
    rows, wide = weight.shape
    rank = A.shape[0]
    weight, A = (t if t.stride(1) == 1 else t.contiguous() for t in (weight, A))
    out = torch.empty_like(squares)
    numbers = float(scaling), rows, wide, weight.stride(0), A.stride(0), B.stride(0), B.stride(1)
    width = max(16, 1 << (rank - 1).bit_length())
    constants = rank, width, _TALL, 64
    grid = -(-rows // _TALL), 1, 1
    launch(dora_triton.norms, grid, (weight, squares, A, B, out), numbers, constants, num_warps=4)
    return out
