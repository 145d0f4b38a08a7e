"""From a float weight to AQLM: fresh codebooks, least squares for given codes, and both in turn.

The objective is that of Egiazarian et al. 2024, arXiv:2401.06118, equation 2: the error of the
layer's outputs on calibration inputs, ``tr((W - V) H (W - V)^T)`` with ``H = X^T X``; without
inputs ``H = I``. Codebooks and scales are solved for as PV-tuning's P step does (Malinovskii et
al. 2024, arXiv:2405.14852, section 3.2), here exactly, since the objective is quadratic in either.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fadapt.bases.aqlm_codes import decode, indices, store
from fadapt.bases.aqlm_search import nearest_codes, to_groups, weighted_codes
from fadapt.errors import AdapterError

if TYPE_CHECKING:
    from fadapt.bases.aqlm import Aqlm


def recode(
    base: "Aqlm",
    weight: Tensor,
    moment: Tensor | None = None,
    beam: int = 8,
    until: float | None = None,
) -> "Aqlm":
    """The base with other codes, closer to ``weight [out, in]``; codebooks and scales as they are.

    Args:
        base: whose codes are kept wherever the search finds nothing closer.
        weight: W, floating ``[out, in]``.
        moment: second moment of the inputs ``X^T X`` ``[in, in]``; None for plain distance.
        beam: combinations that the search keeps; 1 is greedy.
        until: the moment of ``time.monotonic()`` at which the search ends, wherever it stands.
    """
    W = weight.float()
    moment = _damped(moment, base.in_features)
    size = base.codebooks.shape[1]
    books, scales = base.codebooks.float(), _nonzero(base.scales)
    codes = base.codes.long() & (size - 1)
    if moment is None:
        groups = to_groups(W, base.out_group_size, base.in_group_size) / scales
        codes = nearest_codes(
            groups.flatten(0, 1), books.flatten(2), codes.flatten(0, 1), beam, until
        ).reshape(codes.shape)
    else:
        codes = weighted_codes(W, codes, books, scales, moment, beam, until)
    return replace(base, codes=store(codes, base.codes, base.nbits_per_codebook))


def tune_codebooks(
    base: "Aqlm",
    weight: Tensor,
    second_moment: Tensor | None = None,
    steps: int = 10,
) -> "Aqlm":
    """The base with other codebooks and scales, closer to ``weight``; the codes as they are.

    Least squares: conjugate gradients on the codebooks, then each scale in closed form, twice.

    Args:
        base: left as it is.
        weight: the target W, floating ``[out, in]``.
        second_moment: ``X^T X`` of the layer's inputs, ``[in, in]``; None for plain distance. With
            it, the error that falls is that of the layer's *outputs* on those inputs.
        steps: iterations of conjugate gradients for each of the two.

    Returns:
        A base whose error is no larger, with the codes of ``base``.
    """
    _check(base, weight)
    W = weight.float()
    moment = _damped(second_moment, base.in_features)
    index = indices(base.codes, base.codebooks.shape[1])
    books, scales = base.codebooks.float(), _nonzero(base.scales)
    for _ in range(2):
        books = _solve_codebooks(base, index, books, scales, W, moment, steps)
        scales = _solve_scales(base, books, scales, W, moment)
    tuned = replace(
        base,
        codebooks=books.to(base.dtype),
        scales=scales.reshape(base.scales.shape).to(base.scales.dtype),
    )
    better = error_of(tuned, W, second_moment) < error_of(base, W, second_moment)
    return tuned if better else base


def requantize(
    base: "Aqlm", weight: Tensor, second_moment: Tensor | None, rounds: int, beam: int
) -> "Aqlm":
    """``recode``, then ``rounds`` times ``tune_codebooks`` and ``recode``; see Aqlm.requantize."""
    _check(base, weight)
    if torch.equal(base.dequantize(torch.float32), weight.float()):
        return base
    base = recode(base, weight, second_moment, beam)
    for _ in range(rounds):
        base = tune_codebooks(base, weight, second_moment)
        base = recode(base, weight, second_moment, beam)
    return base


def error_of(base: "Aqlm", weight: Tensor, second_moment: Tensor | None = None) -> float:
    """``tr((W - V) H (W - V)^T) / tr(W H W^T)``: the relative squared error of the outputs."""
    W = weight.double()
    error = W - base.dequantize(torch.float64)
    if second_moment is None:
        return (error.square().sum() / W.square().sum()).item()
    H = second_moment.double()
    return ((error @ H * error).sum() / (W @ H * W).sum()).item()


def _check(base: "Aqlm", weight: Tensor) -> None:
    expected = (base.out_features, base.in_features)
    if tuple(weight.shape) != expected:
        raise AdapterError(
            f"An AQLM base of {expected} ([out_features, in_features]) was given a weight of shape "
            f"{tuple(weight.shape)}."
        )
    if not bool(weight.isfinite().all()):
        raise AdapterError("The weight to encode holds NaN or Inf.")


def _nonzero(scales: Tensor) -> Tensor:
    """``[out_groups, 1, 1]``, float32; a group of zeros keeps its codes, at scale 1."""
    scales = scales.float().reshape(-1, 1, 1)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _damped(moment: Tensor | None, n_in: int) -> Tensor | None:
    if moment is None:
        return None
    if tuple(moment.shape) != (n_in, n_in):
        raise AdapterError(
            f"second_moment: expected X^T X of shape {(n_in, n_in)}, got {tuple(moment.shape)}."
        )
    moment = moment.float()
    mean = moment.diagonal().mean()
    # As GPTQ and AQLM damp it: inputs that never occur leave H singular.
    return moment / mean + 1e-2 * torch.eye(n_in, device=moment.device)


def _weigh(matrix: Tensor, moment: Tensor | None) -> Tensor:
    return matrix if moment is None else matrix @ moment


def _solve_codebooks(
    base: "Aqlm",
    index: Tensor,
    books: Tensor,
    scales: Tensor,
    weight: Tensor,
    moment: Tensor | None,
    steps: int,
) -> Tensor:
    out_group, in_group = base.out_group_size, base.in_group_size

    def spread(flat: Tensor) -> Tensor:  # [M * size, d] -> [out, in]
        w = decode(base.codes, flat.view(books.shape))
        return w * scales.reshape(-1, 1).repeat_interleave(out_group, 0)

    def gather(matrix: Tensor) -> Tensor:  # its adjoint
        groups = (to_groups(matrix, out_group, in_group) * scales).flatten(0, 1)
        total = torch.zeros_like(start)
        for m in range(index.shape[1]):
            total.index_add_(0, index[:, m], groups)
        return total

    start = books.reshape(-1, out_group * in_group)
    weights = scales.square().expand(-1, base.codes.shape[1], 1).reshape(-1)
    diagonal = torch.zeros(len(start), device=start.device)
    for m in range(index.shape[1]):
        diagonal.index_add_(0, index[:, m], weights)
    ridge = 1e-4 * diagonal.mean()  # vectors that no group uses stay as they are

    def normal(flat: Tensor) -> Tensor:
        return gather(_weigh(spread(flat), moment)) + ridge * flat

    residual = gather(_weigh(weight - spread(start), moment))
    change = _conjugate_gradients(normal, residual, (diagonal + ridge)[:, None], steps)
    return (start + change).view(books.shape)


def _conjugate_gradients(
    normal: Callable[[Tensor], Tensor], residual: Tensor, diagonal: Tensor, steps: int
) -> Tensor:
    """x with ``normal(x) = residual``, from 0, preconditioned by ``diagonal``."""
    x = torch.zeros_like(residual)
    step = residual / diagonal
    direction, power = step, (residual * step).sum()
    first = power
    for _ in range(steps):
        if power <= 1e-10 * first:
            break
        image = normal(direction)
        length = power / (direction * image).sum()
        x = x + length * direction
        residual = residual - length * image
        step = residual / diagonal
        power, last = (residual * step).sum(), power
        direction = step + (power / last) * direction
    return x


def _solve_scales(
    base: "Aqlm", books: Tensor, scales: Tensor, weight: Tensor, moment: Tensor | None
) -> Tensor:
    """Each scale's best value for these codebooks: ``<V H, W> / <V H, V>`` over its rows."""
    unscaled = decode(base.codes, books)
    weighed = _weigh(unscaled, moment)
    along = (weighed * weight).sum(-1).view(-1, base.out_group_size).sum(-1)
    length = (weighed * unscaled).sum(-1).view(-1, base.out_group_size).sum(-1)
    best = torch.where(length > 0, along / length, scales.flatten())
    return best.reshape(scales.shape)
