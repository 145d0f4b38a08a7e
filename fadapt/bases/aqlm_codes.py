"""AQLM's codes: how a layer holds them, and how they decode to a weight.

A weight ``[out, in]`` is cut into groups of ``[out_group, in_group]`` elements, and a group is a
sum of vectors, one of each codebook (Egiazarian et al. 2024, arXiv:2401.06118, equation 1). The
numbers follow ``aqlm/utils.py``.
"""

import torch
import torch.nn.functional as F
from aqlm import QuantizedLinear
from torch import Tensor

from fadapt.errors import UnsupportedLayerError


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The weight ``[out, in]`` before its scales, in the codebooks' dtype.

    Args:
        codes: int8 or int16 ``[out_groups, in_groups, M]``; only the low bits count, so that the
            negative numbers that stand for the upper half of a codebook index it right.
        codebooks: ``[M, 2**nbits, out_group, in_group]``.
    """
    books, size, out_group, in_group = codebooks.shape
    out_groups, in_groups, _ = codes.shape
    index, vectors = indices(codes, size), codebooks.reshape(books * size, -1)
    if torch.compiler.is_exporting():
        groups = F.embedding(index, vectors).sum(-2)  # ONNX has no embedding_bag of several rows
    else:
        # Sums the M vectors without storing them: twice as fast as a gather and a sum.
        groups = F.embedding_bag(index, vectors, mode="sum")
    grid = groups.view(out_groups, in_groups, out_group, in_group)
    return grid.transpose(1, 2).reshape(out_groups * out_group, in_groups * in_group)


def indices(codes: Tensor, size: int) -> Tensor:
    """int32 ``[groups, M]``: which rows of the codebooks, laid end to end, make each group."""
    ends = torch.arange(codes.shape[-1], dtype=torch.int32, device=codes.device) * size
    return ((codes.int() & (size - 1)) + ends).reshape(-1, codes.shape[-1])


def store(index: Tensor, like: Tensor, nbits: int) -> Tensor:
    """Indices ``[..., M]`` in ``[0, 2**nbits)`` as AQLM stores them: the upper half negative.

    Args:
        index: any integer dtype; left as it is (AQLM's own ``pack_int_data`` writes into it).
        like: codes whose dtype is wanted.
        nbits: bits of a code.
    """
    upper = index >= 2 ** (nbits - 1)
    return torch.where(upper, index - 2**nbits, index).to(like.dtype)


def read_codes(layer: QuantizedLinear) -> Tensor:
    """The codes as ``[out_groups, in_groups, M]``, sharing the layer's storage."""
    codes: Tensor = layer.codes.detach()
    return codes.transpose(0, 1) if is_permuted(layer) else codes


def is_permuted(layer: QuantizedLinear) -> bool:
    """Whether the layer holds its codes as ``[in_groups, out_groups, M]``.

    The first forward of a layer off CUDA, with codebooks of 256 entries, leaves its codes permuted
    to ``[in_groups, out_groups, M]``. Whether that has happened is read off the kernel that the
    layer chose in that forward; shapes cannot tell when both counts are equal.

    Raises:
        UnsupportedLayerError: the shape is neither, or the layer's state does not tell.
    """
    shape = tuple(layer.codes.shape)
    out_groups = layer.out_features // layer.out_group_size
    in_groups = layer.in_features // layer.in_group_size
    plain = (out_groups, in_groups, layer.num_codebooks)
    swapped = (in_groups, out_groups, layer.num_codebooks)
    if shape not in (plain, swapped):
        raise UnsupportedLayerError(
            f"An AQLM layer whose codes have the shape {shape}; its sizes call for "
            f"{plain} ([out_groups, in_groups, codebooks])."
        )
    return _was_permuted(layer) if plain == swapped else shape == swapped


def _was_permuted(layer: QuantizedLinear) -> bool:
    if layer.gemv_op is None or layer.codebook_size != 256:
        return False
    kernel = _kernel(layer.gemv_op)
    if kernel != "dequantize_gemm":
        return kernel == "numba_gemm_lut"
    # No kernel for out_group_size > 1: AQLM permutes off CUDA, not on CUDA, and then runs the same
    # function, so only where it ran can tell (and off CUDA its own output is wrong).
    if layer.codes.device.type == "cuda":
        return False
    if torch.cuda.is_initialized():
        raise UnsupportedLayerError(
            "An AQLM layer of 256-entry codebooks and out_group_size > 1 on the CPU that has run "
            "before, in a process that uses CUDA: nothing tells whether its codes are permuted. "
            "Read it (fadapt.base_of, fadapt.bind) before its first forward."
        )
    return True


def _kernel(op: type) -> str:
    """The name of the function that AQLM's matrix product op was made around."""
    forward = op.forward  # type: ignore[attr-defined]
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    cell = cells.get("forward_pass_kernel")
    if cell is None:
        raise UnsupportedLayerError(
            "An AQLM layer that has run, of an aqlm version whose ops fadapt cannot read "
            "(fadapt knows 1.1). Read it (fadapt.base_of, fadapt.bind) before its first forward."
        )
    return str(getattr(cell.cell_contents, "__name__", ""))
