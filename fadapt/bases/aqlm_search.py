"""The search for AQLM's codes, over all groups at once; the present codes are always a candidate.

As the beam search of Egiazarian et al. 2024, arXiv:2401.06118, section 3.2, it replaces one code at
a time and keeps several combinations; unlike it, each combination goes its own way (the best code
given the others), so that a step is a product and an argmin over every group's combinations.
"""

import time

import torch
from torch import Tensor


def to_groups(weight: Tensor, out_group: int, in_group: int) -> Tensor:
    """``[out, in] -> [out_groups, in_groups, out_group * in_group]``."""
    rows, columns = weight.shape
    cut = weight.reshape(rows // out_group, out_group, columns // in_group, in_group)
    return cut.transpose(1, 2).flatten(2)


def from_groups(groups: Tensor, out_group: int) -> Tensor:
    """The inverse of :func:`to_groups`."""
    out_groups, in_groups, _ = groups.shape
    cut = groups.reshape(out_groups, in_groups, out_group, -1).transpose(1, 2)
    return cut.reshape(out_groups * out_group, -1)


def over(until: float | None) -> bool:
    """Whether that moment of ``time.monotonic()`` has passed."""
    return until is not None and time.monotonic() > until


def nearest_codes(
    targets: Tensor, books: Tensor, current: Tensor, beam: int, until: float | None = None
) -> Tensor:
    """For each target the codes whose vectors sum closest to it, as far as a beam finds them.

    Args:
        targets: float ``[n, d]``.
        books: codebooks ``[M, size, d]``.
        current: int64 ``[n, M]``; kept unless something is closer.
        beam: how many combinations are improved beside the current one, at least 1.
        until: after that moment of ``time.monotonic()``, what is left keeps its codes.

    Returns:
        int64 ``[n, M]``.
    """
    # 2**20 floats of scores at a time.
    count = max(1, 2**20 // (books.shape[1] * (beam if len(books) > 1 else 1)))
    pairs = zip(targets.split(count), current.split(count), strict=True)
    return torch.cat([c if over(until) else _nearest(t, books, c, beam) for t, c in pairs])


def weighted_codes(
    weight: Tensor,
    codes: Tensor,
    books: Tensor,
    scales: Tensor,
    moment: Tensor,
    beam: int,
    until: float | None = None,
) -> Tensor:
    """Codes that lower ``tr((W - V) H (W - V)^T)``, by one pass over the columns' groups.

    A pass meets each group of columns once, for all rows at once. The others fixed, the best free
    value of group j is ``t = W_j + (sum_{k != j} E_k H_kj) H_jj^-1`` with ``E = W - V``, and the
    distance from it is measured by ``H_jj = L L^T``: plain nearest codes after a product with L.

    Args:
        weight: W, float ``[out, in]``.
        codes: int64 ``[out_groups, in_groups, M]``, the current ones.
        books: ``[M, size, out_group, in_group]``.
        scales: ``[out_groups, 1, 1]``, none of them zero.
        moment: H ``[in, in]``, positive definite.
        beam, until: as in :func:`nearest_codes`.

    Returns:
        int64, shaped as ``codes``.
    """
    out_group, in_group = books.shape[2:]
    codes = codes.clone()
    error = weight - from_groups(vectors(codes, books) * scales, out_group)
    pull = error @ moment
    for j in range(codes.shape[1]):
        if over(until):
            break
        here = slice(j * in_group, (j + 1) * in_group)
        block = moment[here, here]
        lower = torch.linalg.cholesky(block)
        others = pull[:, here] - error[:, here] @ block
        best = weight[:, here] + torch.cholesky_solve(others.mT, lower).mT
        targets = ((best @ lower).reshape(-1, out_group * in_group)) / scales[:, 0]
        turned = (books @ lower).flatten(2)
        codes[:, j] = nearest_codes(targets, turned, codes[:, j], beam)
        found = from_groups(vectors(codes[:, j : j + 1], books) * scales, out_group)
        fresh = weight[:, here] - found
        pull += (fresh - error[:, here]) @ moment[here]
        error[:, here] = fresh
    return codes


def vectors(codes: Tensor, books: Tensor) -> Tensor:
    """The sums of vectors that int64 codes ``[..., M]`` stand for: ``[..., d]``."""
    flat = books.flatten(2)
    total = flat[0][codes[..., 0]]
    for m in range(1, len(flat)):
        total = total + flat[m][codes[..., m]]
    return total


def _nearest(targets: Tensor, books: Tensor, current: Tensor, beam: int) -> Tensor:
    norms = books.square().sum(-1)
    if len(books) == 1:
        best = _closest(targets, books[0], norms[0])[:, None]
    else:
        best = _search(targets, books, norms, current, beam)
    # Rounding must not trade the current codes for others that are no closer.
    old = (targets - vectors(current, books)).square().sum(-1, keepdim=True)
    new = (targets - vectors(best, books)).square().sum(-1, keepdim=True)
    return torch.where(new < old * (1 - 1e-6), best, current)


def _search(targets: Tensor, books: Tensor, norms: Tensor, current: Tensor, beam: int) -> Tensor:
    """From the current codes and ``beam`` greedy ones, a codebook at a time, while it helps."""
    codes = torch.cat([current[:, None], _grown(targets, books, norms, beam)], 1)
    count, width, size = codes.shape
    rows = torch.arange(count, device=codes.device).repeat_interleave(width)
    codes = codes.flatten(0, 1)
    residual = targets[rows] - vectors(codes, books)
    going = torch.arange(len(codes), device=codes.device)
    for _ in range(4):
        active, rest = codes[going], residual[going]
        before = rest.square().sum(-1)
        for m, book in enumerate(books):
            free = rest + book[active[:, m]]
            code = _closest(free, book, norms[m])
            active[:, m], rest = code, free - book[code]
        codes[going], residual[going] = active, rest
        going = going[rest.square().sum(-1) < before * (1 - 1e-5)]
        if not len(going):
            break
    which = residual.square().sum(-1).view(count, width).argmin(-1)
    return codes.view(count, width, size)[torch.arange(count, device=codes.device), which]


def _grown(targets: Tensor, books: Tensor, norms: Tensor, beam: int) -> Tensor:
    """Codes ``[n, beam, M]``: the closest few of the first codebook, the others greedily after."""
    scores = torch.addmm(norms[0], targets, books[0].mT, alpha=-2)
    first = scores.topk(min(beam, scores.shape[1]), largest=False).indices
    codes, residual = [first], (targets[:, None] - books[0][first]).flatten(0, 1)
    for book, norm in zip(books[1:], norms[1:], strict=True):
        code = _closest(residual, book, norm)
        residual = residual - book[code]
        codes.append(code.view(first.shape))
    return torch.stack(codes, -1)


def _closest(points: Tensor, book: Tensor, norm: Tensor) -> Tensor:
    return torch.addmm(norm, points, book.mT, alpha=-2).argmin(-1)
