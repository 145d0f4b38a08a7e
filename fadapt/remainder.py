"""Merge what the format takes, and keep the rest beside it as one small LoRA adapter.

What rounding lost is itself approximated by a product of low rank (as LQER keeps the error of
quantization: Zhang et al. 2024, arXiv:2402.02446, equations 7 to 9, with the inputs' second moment
for its diagonal scale). With a LoRA adapter of rank r merged, a remainder of rank r loses nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.aqlm_merge import Recode
from fadapt.bases.grid import Gridded
from fadapt.errors import ConfigError
from fadapt.layer_merge import Merged, with_bias
from fadapt.lora import LoRA
from fadapt.merging import merge_layers
from fadapt.method import over
from fadapt.plan import check_untied, plan
from fadapt.shell import join
from fadapt.targets import exact_pattern


def merge_with_remainder(
    model: nn.Module,
    params: Any,
    method: Any,
    rank: int,
    *,
    moments: Mapping[str, Tensor] | None = None,
    aqlm: Recode | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any], LoRA]:
    """Weights in the formats that they had, and a LoRA adapter of ``rank`` for what they lost.

    Args:
        model, params, method, **options: as :func:`fadapt.merge`; any number of adapters, of any
            method, become one.
        rank: of the remainder, at most; at least 1.
        moments: ``{path: X^T X}``: the error of the outputs is made smallest, not that of W.
        aqlm: how AQLM layers are recoded first; None keeps their codes as they are.

    Returns:
        ``(state, remainder, its method)``: ``bind(model, method2, state=state)(remainder, x)``.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(8, 8).bfloat16(), fadapt.OFT(block_size=4)
        >>> params = {"": fadapt.OFTParams(torch.ones(2, 6) / 9)}
        >>> state, rest, kind = fadapt.merge_with_remainder(model, params, method, rank=2)
        >>> forward, x = fadapt.bind(model, kind, state=state), torch.ones(1, 8).bfloat16()
        >>> forward(rest, x).shape
        torch.Size([1, 8])
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be an integer of at least 1, got {rank!r}.")
    if options.get("to") is not None:
        raise ConfigError(
            "to= names another format, which another model holds: merge_with_remainder"
            " keeps the model's own."
        )
    todo = plan(model, params, method, options.get("safe", True))
    check_untied(model, list(todo.bases))
    state, rest = todo.beside, {}
    kind = LoRA(rank=rank, alpha=rank, targets=exact_pattern(todo.bases))
    for path in todo.bases:
        one = todo.only(path)
        if aqlm is None and not isinstance(todo.bases[path], Gridded):
            adapted = todo.adapted(path)
            merged = Merged(with_bias(adapted.base, adapted.bias))
        else:
            ((_, adapted, merged),) = merge_layers(one, moments=moments, aqlm=aqlm, **options)
        error = adapted.dequantize(torch.float32) - merged.base.dequantize(torch.float32)
        A, B = low_rank(error, min(rank, *error.shape), (moments or {}).get(path))
        size = rank - len(A)
        A = torch.cat([A, A.new_zeros(size, A.shape[1])])
        B = torch.cat([B, B.new_zeros(len(B), size)], 1)
        here = over(todo.bases[path], kind, path)
        rest[path] = here.leaf(todo.bases[path], A.contiguous(), B.contiguous())
        if merged.base is not adapted.base:
            state |= {join(path, name): t for name, t in merged.base.state().items()}
    return state, rest, kind


def low_rank(matrix: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` whose product is closest to ``matrix`` ``[out, in]``.

    Closest for inputs of this second moment: the leading singular vectors of ``matrix L`` with
    ``H = L L^T``, found by subspace iteration from a fixed start (Halko et al. 2011,
    arXiv:0909.4061, algorithm 4.4).
    """
    work, lower = matrix.double(), None
    if moment is not None:
        H = moment.double()
        H = H + 1e-4 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
        lower = torch.linalg.cholesky(H)
        work = work @ lower
    width = min(rank + 8, *matrix.shape)
    start = torch.randn(
        matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(matrix.device)
    basis, _ = torch.linalg.qr(work @ start)
    for _ in range(4):
        back, _ = torch.linalg.qr(work.mT @ basis)
        basis, _ = torch.linalg.qr(work @ back)
    u, s, vh = torch.linalg.svd(basis.mT @ work, full_matrices=False)
    root = s[:rank].sqrt()
    B, A = basis @ u[:, :rank] * root, root[:, None] * vh[:rank]
    if lower is not None:
        A = torch.linalg.solve_triangular(lower, A, upper=False, left=False)
    return A.to(matrix.dtype), B.to(matrix.dtype)
