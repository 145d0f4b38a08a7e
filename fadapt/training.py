"""K adapters in one step: their losses, their gradients, and AdamW with settings of each.

All K adapters are one tensor ``[K, P]``, each a row: then clipping, moments and freezing are a few
elementwise operations, whatever the number of layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fadapt.adapter import scale_by
from fadapt.corpus import IGNORED
from fadapt.gradients import value_and_grad

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Layout(NamedTuple):
    """How a stack of adapters lies in rows: the shapes of its leaves without K, and its tree."""

    shapes: tuple[torch.Size, ...]
    spec: Any

    @property
    def size(self) -> int:
        """P, the numbers in a row."""
        return sum(math.prod(shape) for shape in self.shapes)

    def tree(self, rows: Tensor) -> Any:
        """``[K, P]`` as the stack, or ``[P]`` as one adapter: views; differentiable."""
        parts = rows.split([math.prod(s) for s in self.shapes], dim=-1)
        leaves = [p.unflatten(-1, s) for p, s in zip(parts, self.shapes, strict=True)]
        return tree_unflatten(leaves, self.spec)


def to_rows(many: Any) -> tuple[Tensor, Layout]:
    """A stack as ``[K, P]``, a copy, and its layout."""
    leaves, spec = tree_flatten(many)
    layout = Layout(tuple(leaf.shape[1:] for leaf in leaves), spec)
    return torch.cat([leaf.flatten(1) for leaf in leaves], 1), layout


class State(NamedTuple):
    """Where training stands.

    Attributes:
        params: ``[K, P]``.
        first, second: AdamW's moments, ``[K, P]``.
        good: the parameters that each adapter last had a finite loss with, ``[K, P]``.
        frozen: the step at which an adapter was frozen; -1 for one that trains; int64 ``[K]``.
        step: how many steps were made.
    """

    params: Tensor
    first: Tensor
    second: Tensor
    good: Tensor
    frozen: Tensor
    step: int


def start(params: Tensor) -> State:
    """The state before the first step."""
    frozen = torch.full((len(params),), -1, device=params.device)
    zeros = torch.zeros_like(params)
    return State(params, zeros, zeros.clone(), params.clone(), frozen, 0)


def token_losses(
    forward: Any, params: Any, scales: Any, tokens: Tensor, dropout: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One adapter's summed loss over windows, and how many tokens it is over.

    Args:
        forward: of :func:`fadapt.bind`.
        params: the adapter; None for the base.
        scales: ``{path: []}`` for :func:`fadapt.scale_by`; None where ``forward`` scales itself.
        tokens: int64 ``[windows, length + 1]``, labels :data:`fadapt.corpus.IGNORED` not counted.
        dropout: a seed, or None.
    """
    if scales is not None:
        params = scale_by(params, scales)
    seed = {} if dropout is None else {"dropout": dropout}
    inputs, labels = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    logits = forward(params, input_ids=inputs, use_cache=False, **seed).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss, (labels != IGNORED).sum()


def over_adapters(
    call: Callable[..., Any], rows: Tensor, scales: Any, tokens: Tensor, dropout: Tensor | None
) -> Any:
    """``call(row, scales, tokens, dropout)`` of K adapters at once; without ``vmap`` for one.

    Args:
        call: a function that takes ``in_dims`` and gives a function of these four, as ``vmap``.
        rows: ``[K, P]``.
        scales: ``{path: [K]}``, or None.
        tokens: ``[K, windows, length + 1]``.
        dropout: seeds ``[K]``, or None.
    """
    values = (rows, scales, tokens, dropout)
    if len(rows) > 1:
        return call(tuple(None if v is None else 0 for v in values))(*values)
    one = tree_map(lambda leaf: None if leaf is None else leaf[0], values)
    return tree_map(lambda leaf: leaf[None], call(None)(*one))


def gradients(
    forward: Any,
    layout: Layout,
    rows: Tensor,
    scales: Any,
    tokens: Tensor,
    dropout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each adapter's mean loss ``[K]`` and its gradient ``[K, P]``; arguments as above.

    A loss that is NaN spoils its own row alone: no adapter's loss depends on another's row.
    """

    def loss(row: Tensor, s: Any, t: Tensor, d: Tensor | None) -> Tensor:
        total, count = token_losses(forward, layout.tree(row), s, t, d)
        return total / count

    def call(dims: Any) -> Any:
        return value_and_grad(loss, dims)

    losses, grads = over_adapters(call, rows, scales, tokens, dropout)
    return losses, grads


def update(
    state: State, losses: Tensor, grads: Tensor, lrs: Tensor, clip: float, decay: float
) -> State:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for each row.

    An adapter whose loss or gradient is not finite is frozen: it keeps the last parameters with
    which its loss was finite.

    Args:
        state: unchanged.
        losses: ``[K]``.
        grads: ``[K, P]``.
        lrs: the learning rate of each at this step, ``[K]``.
        clip: the largest norm that a row of ``grads`` may have; a longer one is scaled to it.
        decay: the weight decay.
    """
    norms = torch.linalg.vector_norm(grads, dim=1)
    training, finite = state.frozen < 0, losses.isfinite()
    moves = training & finite & norms.isfinite()
    grads = grads * (clip / norms.clamp(min=clip))[:, None]
    count = state.step + 1
    first = torch.lerp(state.first, grads, 1 - BETA1)
    second = (state.second * BETA2).addcmul_(grads, grads, value=1 - BETA2)
    change = (second / (1 - BETA2**count)).sqrt_().add_(EPS).reciprocal_().mul_(first)
    change *= (lrs / (1 - BETA1**count))[:, None]
    moved = (state.params * (1 - lrs * decay)[:, None] if decay else state.params) - change
    if moves.all():  # as nearly always: nothing to choose
        return State(moved, first, second, state.params, state.frozen, count)
    good = torch.where((training & finite)[:, None], state.params, state.good)
    kept = moves[:, None]
    return State(
        torch.where(kept, moved, good),
        torch.where(kept, first, state.first),
        torch.where(kept, second, state.second),
        good,
        torch.where(training & ~moves, state.step, state.frozen),
        count,
    )


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate: a linear rise, then half a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def evaluate(
    forward: Any, layout: Layout, rows: Tensor, scales: Any, held: Tensor, size: int
) -> Tensor:
    """Each adapter's mean loss a token over its held-out windows, ``[K]``.

    Args:
        forward, layout, rows, scales: as in :func:`gradients`.
        held: ``[K, windows, length + 1]``.
        size: windows at once.
    """

    def loss(row: Tensor, s: Any, t: Tensor, _: None) -> tuple[Tensor, Tensor]:
        return token_losses(forward, layout.tree(row), s, t)

    def call(dims: Any) -> Any:
        return loss if dims is None else vmap(loss, dims)

    with torch.no_grad():
        parts = [over_adapters(call, rows, scales, t, None) for t in held.split(size, 1)]
    return _mean(parts)


def evaluate_base(forward: Any, held: Sequence[Tensor], size: int) -> Tensor:
    """The base's own mean loss a token on each text ``[windows, length + 1]``."""
    means = []
    with torch.no_grad():
        for tokens in held:
            parts = [token_losses(forward, None, None, t) for t in tokens.split(size)]
            means.append(_mean(parts))
    return torch.stack(means)


def _mean(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    sums, counts = zip(*parts, strict=True)
    return torch.stack(sums).sum(0) / torch.stack(counts).sum(0)


def alone(forward: Any, params: Any, lr: float, clip: float, decay: float) -> Callable[..., None]:
    """The usual loop for one adapter, to time against: no vmap, torch's own fused AdamW.

    Returns:
        ``step(tokens, dropout)``, which trains a copy of ``params``.
    """
    copies = tree_map(lambda t: t.detach().clone().requires_grad_(), params)
    leaves, _ = tree_flatten(copies)
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=decay, fused=True)

    def step(tokens: Tensor, dropout: Tensor | None) -> None:
        loss, count = token_losses(forward, copies, None, tokens, dropout)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(leaves, clip)
        optimizer.step()
        optimizer.zero_grad()

    return step
