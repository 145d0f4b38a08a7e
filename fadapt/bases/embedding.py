"""A dense embedding: a table whose rows are looked up by ids."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fadapt._pytree import frozen_pytree
from fadapt.bases.dense import Dense, check_plain
from fadapt.bases.protocol import register_base
from fadapt.errors import UnsupportedLayerError


@frozen_pytree
@dataclass(frozen=True)
class Embedding(Dense):
    """``E[ids]``. Its matrix ``[out, in]`` is the table, ``[num_embeddings, embedding_dim]``.

    Attributes:
        padding_idx: the id whose row of a table gets no gradient; None if all do.
    """

    padding_idx: int | None = None

    def linear(self, x: Tensor) -> Tensor:
        """``E[x]``: ids ``[...]`` to ``[..., embedding_dim]``, the call that ``nn.Embedding``
        makes."""
        return F.embedding(x, self.weight)

    def look_up(self, ids: Tensor, table: Tensor, owner: Tensor | None = None) -> Tensor:
        """Rows of another table ``[num_embeddings, r]``, or of ``[K, num_embeddings, r]``.

        Args:
            ids: ``[...]``; with ``owner`` ``[n, m]``.
            table: differentiable, but for the padding's row.
            owner: ``[n]``, which of K tables each row of ids reads.

        Returns:
            ``[..., r]``.
        """
        h = F.embedding(ids, table) if owner is None else table[owner[:, None], ids]
        if self.padding_idx is None:
            return h
        # Not F.embedding's own padding_idx, which acts in reverse mode alone.
        return torch.where((ids == self.padding_idx).unsqueeze(-1), h.detach(), h)


def _read(module: nn.Embedding) -> Embedding:
    kind: Any = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.forward is not nn.Embedding.forward:
        raise UnsupportedLayerError(
            f"{name} is an nn.Embedding with a forward of its own, which fadapt cannot assume to "
            "be E[ids]. Leave it out of the targets (exclude=)."
        )
    if module.max_norm is not None:
        raise UnsupportedLayerError(
            f"this {name} has max_norm={module.max_norm}: its forward writes renormalised rows "
            "into its weight, and a base is frozen. Renormalise once, and set max_norm to None."
        )
    if module.scale_grad_by_freq:
        raise UnsupportedLayerError(
            f"this {name} has scale_grad_by_freq=True: its gradient is not the derivative of its "
            "output, so no transform could agree with it. Set it to False."
        )
    check_plain(module.weight, name)
    return Embedding(module.weight.detach(), padding_idx=module.padding_idx)


register_base(nn.Embedding, _read)
