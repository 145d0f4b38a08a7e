"""Several LoRA adapters made into one, as PEFT's ``add_weighted_adapter`` does, in pure form.

Read from ``peft/utils/merge_utils.py`` and ``tuners/lora/model.py`` of PEFT 0.21. TIES: Yadav et
al. 2023, arXiv:2306.01708. DARE: Yu et al. 2023, arXiv:2311.03099.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.errors import AdapterError, ConfigError
from fadapt.lora import LoRA, LoRAParams
from fadapt.lora_embedding import LoRAEmbeddingParams
from fadapt.targets import exact_pattern

_RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("cat", "svd", *_RULES, *(f"{rule}_svd" for rule in _RULES[1:]))

Adapter = Mapping[str, Any]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | Tensor,
    method: str = "svd",
    *,
    methods: LoRA | Sequence[LoRA] | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """One LoRA adapter out of several, weighted.

    ``"cat"`` puts them side by side, ``sum_i w_i s_i B_i A_i`` exactly, its rank the sum of theirs;
    ``"svd"`` is the best approximation of that with ``rank``. The other rules work on A and on B
    each by itself, which is cheap, and rough: ``(sum_i v_i B_i)(sum_i v_i A_i)`` with
    ``v_i = sqrt(w_i s_i)``, after pruning: ``"linear"`` none, ``"magnitude_prune"`` all but the
    largest, ``"ties"`` that and those whose sign is in the minority, ``"dare_linear"`` and
    ``"dare_ties"`` at random. With ``_svd`` added they work on ``s_i B_i A_i``, and an SVD follows.

    Args:
        adapters: LoRA adapters ``{path: LoRAParams}``, an embedding's too. A layer that some of
            them lack is combined of those that have it.
        weights: one for each, of any sign; a tensor ``[n]`` is differentiable.
        method: the rule, PEFT's ``combination_type``.
        methods: their methods, or one for all; None takes every scaling for 1.
        rank: of the result, for ``"svd"`` and ``_svd``; the largest of theirs if left out.
        density: the share of elements that pruning keeps, in [0, 1] (DARE: in (0, 1]).
        majority_sign: for TIES: the sign of the ``"total"``, or of the ``"frequency"``.
        clamp: for the SVD: cut its factors off at this quantile.
        generator: for DARE, where the masks are drawn.

    Returns:
        The combined adapter, its scaling 1 and every layer of one rank; with ``methods``,
        ``(adapter, method)``.

    Raises:
        ConfigError: an unknown rule, or an option that it lacks or does not use.
        AdapterError: something other than LoRA parameters without a bias; ranks that differ where
            A and B are combined each by itself.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2, alpha=4, init="orthogonal")
        >>> g = torch.Generator().manual_seed(0)
        >>> a, b = (fadapt.init(method, model, generator=g) for _ in range(2))
        >>> both, wide = fadapt.combine([a, b], [0.5, 0.5], "cat", methods=method)
        >>> x = torch.ones(4)
        >>> mean = (fadapt.bind(model, method)(a, x) + fadapt.bind(model, method)(b, x)) / 2
        >>> torch.allclose(fadapt.bind(model, wide)(both, x), mean, atol=1e-6)
        True
    """
    _check_options(method, rank, density, majority_sign, clamp, generator)
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"combine() was given {len(adapters)} adapters and {len(weights)} weights; it takes "
            "at least one, and a weight for each."
        )
    each = [methods] * len(adapters) if methods is None or isinstance(methods, LoRA) else methods
    if len(each) != len(adapters):
        raise AdapterError(f"combine() was given {len(adapters)} adapters, {len(each)} methods.")
    scalings = [_scalings(k, a, m) for k, (a, m) in enumerate(zip(adapters, each, strict=True))]
    weights = torch.as_tensor(weights, dtype=None if isinstance(weights, Tensor) else torch.float32)
    widest = max(leaf[0].shape[0] for adapter in adapters for leaf in adapter.values())
    combined: dict[str, Any] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        have = [k for k, adapter in enumerate(adapters) if path in adapter]
        leaves = [adapters[k][path] for k in have]
        like = leaves[0][0]
        kind = torch.promote_types(like.dtype, torch.float32)
        As, Bs = [A.to(kind) for A, _ in leaves], [B.to(kind) for _, B in leaves]
        _check_shapes(path, As, Bs, same=method in _RULES)
        scaling = [scalings[k][path] for k in have]
        w = torch.stack([weights[k] for k in have]).to(like.device, kind)
        ws = w * w.new_tensor(scaling)
        rule = method.removesuffix("_svd")
        if rule == "svd":
            rule = "linear"

        def mix(tensors: list[Tensor], v: Tensor, rule: str = rule) -> Tensor:
            return _mix(rule, tensors, v, density, majority_sign, generator)

        if method == "cat":
            A = torch.cat([a * v for a, v in zip(As, ws, strict=True)])
            B = torch.cat(Bs, 1)
        elif method in _RULES:
            root = ws.abs().sqrt()
            A, B = mix(As, torch.where(ws >= 0, root, -root)), mix(Bs, root)
        else:
            deltas = [b @ a.flatten(1) * v for a, b, v in zip(As, Bs, scaling, strict=True)]
            A, B = _factors(mix(deltas, w), rank or widest, clamp)
            A = A.unflatten(1, like.shape[1:])
        combined[path] = type(leaves[0])(A.to(like.dtype), B.to(like.dtype))
    size = max(leaf[0].shape[0] for leaf in combined.values())
    combined = {path: _padded(leaf, size) for path, leaf in combined.items()}
    if methods is None:
        return combined
    first = each[0]
    assert first is not None
    targets = exact_pattern(combined)
    return combined, LoRA(rank=size, alpha=size, targets=targets, dropout=first.dropout)


def _mix(
    rule: str,
    tensors: list[Tensor],
    weights: Tensor,
    density: float | None,
    majority_sign: str,
    generator: torch.Generator | None,
) -> Tensor:
    """The weighted sum of tensors of one shape, each pruned first."""
    if density is not None:
        if rule.startswith("dare"):
            tensors = [_drop(t, density, generator) for t in tensors]
        else:
            tensors = [_largest(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    parts = stacked * weights.reshape(-1, *[1] * (stacked.dim() - 1))
    if not rule.endswith("ties"):
        return parts.sum(0)
    sign = stacked.sign()
    votes = (stacked if majority_sign == "total" else sign).sum(0)
    agrees = sign == torch.where(votes >= 0, 1, -1)
    return (parts * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The share ``density`` of the elements that are largest; 0 for the others."""
    if density == 1:
        return tensor
    flat = tensor.flatten()
    top = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, top, flat[top]).reshape(tensor.shape)


def _drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Each element kept with probability ``density``, and divided by it."""
    if density == 1:
        return tensor
    assert generator is not None
    chance = torch.full(tensor.shape, density, device=generator.device)
    keep = torch.bernoulli(chance, generator=generator).to(tensor)
    return tensor * keep / density


def _factors(delta: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of the best approximation of delta with rank r."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    if clamp is not None:
        high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        B, A = B.clamp(-high, high), A.clamp(-high, high)
    return A, B


def _padded(leaf: Any, rank: int) -> Any:
    A, B = leaf
    missing = rank - A.shape[0]
    return type(leaf)(F.pad(A, (0, 0) * (A.dim() - 1) + (0, missing)), F.pad(B, (0, missing)))


def _scalings(number: int, adapter: Adapter, method: LoRA | None) -> dict[str, float]:
    for path, leaf in adapter.items():
        if type(leaf) not in (LoRAParams, LoRAEmbeddingParams):
            kind = "a module trained whole" if isinstance(leaf, Mapping) else type(leaf).__name__
            raise AdapterError(
                f"adapter {number}, {path!r}: combine() takes LoRAParams, and this is {kind}. "
                "Merge such adapters into the weights one after another instead (fadapt.merge)."
            )
    if method is None:
        return dict.fromkeys(adapter, 1.0)
    if type(method) is not LoRA:
        raise ConfigError(f"adapter {number}: combine() takes LoRA, not {type(method).__name__}.")
    return {path: at.scaling for path, at in method.at(list(adapter)).items()}


def _check_shapes(path: str, As: list[Tensor], Bs: list[Tensor], same: bool) -> None:
    pairs = list(zip(As, Bs, strict=True))
    if any(a.shape[1:] != As[0].shape[1:] or b.shape[0] != Bs[0].shape[0] for a, b in pairs):
        raise AdapterError(
            f"layer {path!r}: the adapters are of layers of different sizes, lora_A "
            f"{[list(a.shape) for a in As]} and lora_B {[list(b.shape) for b in Bs]}."
        )
    ranks = [a.shape[0] for a in As]
    if same and len(set(ranks)) > 1:
        raise AdapterError(
            f"layer {path!r}: ranks {ranks} differ, and this rule adds A to A and B to B. Use "
            "'cat', 'svd', or a rule with '_svd'."
        )


def _check_options(
    method: str,
    rank: int | None,
    density: float | None,
    majority_sign: str,
    clamp: float | None,
    generator: torch.Generator | None,
) -> None:
    if method not in COMBINATIONS:
        raise ConfigError(f"method must be one of {', '.join(COMBINATIONS)}; got {method!r}.")
    svd, dare = method.endswith("svd"), method.startswith("dare")
    prunes = method not in ("linear", "cat", "svd")
    for name, value, used in (
        ("rank", rank, svd),
        ("clamp", clamp, svd),
        ("density", density, prunes),
        ("generator", generator, dare),
    ):
        if value is not None and not used:
            raise ConfigError(f"{name} was given, and method={method!r} does not use it.")
    if majority_sign not in ("total", "frequency"):
        raise ConfigError(f"majority_sign must be total or frequency, got {majority_sign!r}.")
    if prunes and (density is None or not 0 <= density <= 1 or (dare and density == 0)):
        raise ConfigError(
            f"method={method!r} prunes: it needs density=, the share to keep, in "
            f"{'(0, 1]' if dare else '[0, 1]'}; got {density!r}."
        )
    if dare and generator is None and density != 1:
        raise ConfigError(
            f"method={method!r} draws random numbers: pass "
            "generator=torch.Generator().manual_seed(...). The global one is never read."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    if clamp is not None and not 0 <= clamp <= 1:
        raise ConfigError(f"clamp is a quantile, in [0, 1]; got {clamp!r}.")
