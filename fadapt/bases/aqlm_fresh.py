"""A float weight as AQLM from nothing: residual k-means, then the search and least squares in turn.

The course is that of Egiazarian et al. 2024, arXiv:2401.06118, section 3: initialise by residual
k-means, then alternate codes and codebooks. No fine-tuning of whole blocks follows here.
"""

import torch
from torch import Tensor

from fadapt.bases.aqlm import Aqlm
from fadapt.bases.aqlm_codes import store
from fadapt.bases.aqlm_encode import recode, tune_codebooks
from fadapt.bases.aqlm_search import nearest_codes, over, to_groups
from fadapt.errors import ConfigError


def encode(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_codebooks: int = 2,
    nbits_per_codebook: int = 8,
    in_group_size: int = 8,
    out_group_size: int = 1,
    second_moment: Tensor | None = None,
    rounds: int = 3,
    beam: int = 8,
    generator: torch.Generator,
    until: float | None = None,
) -> Aqlm:
    """``weight`` as an AQLM base.

    A code of ``num_codebooks * nbits_per_codebook`` bits stands for ``in_group_size *
    out_group_size`` elements; codebooks and one scale a row of groups come on top (see
    :func:`bits_per_weight`).

    Args:
        weight: ``[out, in]``, floating; its dtype becomes that of codebooks and scales.
        bias: ``[out]`` or None, kept as it is.
        num_codebooks: M.
        nbits_per_codebook: a codebook has ``2**nbits`` vectors; 1 to 16.
        in_group_size: columns of a group; must divide in.
        out_group_size: rows of a group; must divide out.
        second_moment: ``X^T X`` of the layer's inputs ``[in, in]``: lowers the error of the
            outputs instead of that of the weight.
        rounds: of least squares and search, after k-means.
        beam: of the search.
        generator: draws the first vectors of k-means.
        until: the moment of ``time.monotonic()`` after which nothing is improved any more.

    Raises:
        ConfigError: sizes that do not divide, or out of range.

    Example:
        >>> import torch
        >>> from fadapt.bases.aqlm_fresh import encode
        >>> g = torch.Generator().manual_seed(0)
        >>> base = encode(torch.randn(16, 32, generator=g), nbits_per_codebook=4, generator=g)
        >>> base.codes.shape
        torch.Size([16, 4, 2])
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ConfigError(
            f"encode takes a floating weight [out, in], got {tuple(weight.shape)} {weight.dtype}."
        )
    out, n_in = weight.shape
    if min(in_group_size, out_group_size) < 1 or n_in % in_group_size or out % out_group_size:
        raise ConfigError(
            f"AQLM groups of {out_group_size} x {in_group_size} (out_group_size x in_group_size) "
            f"do not tile a weight of shape {tuple(weight.shape)}."
        )
    if not 1 <= nbits_per_codebook <= 16 or num_codebooks < 1:
        raise ConfigError(
            f"AQLM has 1 or more codebooks of 1 to 16 bits, got {num_codebooks} x "
            f"{nbits_per_codebook}."
        )
    groups = to_groups(weight.float(), out_group_size, in_group_size)
    scales = groups.square().mean((1, 2), keepdim=True).sqrt()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    points = (groups / scales).flatten(0, 1)
    books, index = _residual_kmeans(points, num_codebooks, 2**nbits_per_codebook, generator, until)
    dtype = torch.int8 if nbits_per_codebook <= 8 else torch.int16
    like = torch.empty(0, dtype=dtype, device=weight.device)
    base = Aqlm(
        codes=store(index.view(*groups.shape[:2], -1), like, nbits_per_codebook),
        codebooks=books.view(*books.shape[:2], out_group_size, in_group_size).to(weight.dtype),
        scales=scales[..., None].to(weight.dtype),
        bias=bias,
    )
    if num_codebooks > 1 or second_moment is not None:
        base = recode(base, weight, second_moment, beam, until)
    for _ in range(rounds):
        if over(until):
            break
        base = tune_codebooks(base, weight, second_moment)
        base = recode(base, weight, second_moment, beam, until)
    return base


def bits_per_weight(base: Aqlm) -> tuple[float, float]:
    """Bits an element that ``base`` takes: the codes' alone, and with codebooks and scales."""
    elements = base.in_features * base.out_features
    codes = base.codes.numel() * base.nbits_per_codebook
    floats = (base.codebooks.numel() + base.scales.numel()) * base.codebooks.element_size() * 8
    return codes / elements, (codes + floats) / elements


def _residual_kmeans(
    points: Tensor, books: int, size: int, generator: torch.Generator, until: float | None
) -> tuple[Tensor, Tensor]:
    """Codebooks ``[books, size, d]``, each of what those before it leave, and the codes."""
    found, codes, rest = [], [], points
    for _ in range(books):
        book = _kmeans(rest, size, generator, until)
        code = _assign(rest, book)
        found.append(book)
        codes.append(code)
        rest = rest - book[code]
    return torch.stack(found), torch.stack(codes, -1)


def _kmeans(
    points: Tensor, size: int, generator: torch.Generator, until: float | None, steps: int = 8
) -> Tensor:
    """Lloyd's algorithm on a sample; with no more points than vectors, the points themselves."""
    order = torch.randperm(len(points), generator=generator, device=generator.device)
    sample = points[order[: 64 * size].to(points.device)]
    book = sample[:size]
    if len(points) <= size:
        return torch.cat([book, book.new_zeros(size - len(book), book.shape[1])])
    for _ in range(steps):
        if over(until):
            break
        code = _assign(sample, book)
        total = torch.zeros_like(book).index_add_(0, code, sample)
        count = torch.bincount(code, minlength=size)[:, None]
        book = torch.where(count > 0, total / count.clamp(min=1), book)
    return book


def _assign(points: Tensor, book: Tensor) -> Tensor:
    zeros = torch.zeros(len(points), 1, dtype=torch.int64, device=points.device)
    return nearest_codes(points, book[None], zeros, 1)[:, 0]
