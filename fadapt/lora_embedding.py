"""LoRA over an embedding: ``y = E[ids] + s B A[:, ids]``, as PEFT's ``lora.Embedding`` has it."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.bases import Base, Embedding
from fadapt.errors import ConfigError
from fadapt.lora import LoRA, check_factors, is_lora, seeded
from fadapt.method import over
from fadapt.random import draw
from fadapt.rows import Rows, keep_base


class LoRAEmbeddingParams(NamedTuple):
    """``lora_embedding_A [r, num_embeddings]`` and ``lora_embedding_B [embedding_dim, r]``, in one
    floating dtype."""

    lora_embedding_A: Tensor
    lora_embedding_B: Tensor


class EmbeddingLoRA(LoRA):
    """:class:`fadapt.LoRA` as it stands at an embedding."""

    @property
    def params_type(self) -> Any:
        """The NamedTuple of one layer's parameters."""
        return LoRAEmbeddingParams

    def init_layer(self, base: Base, generator: torch.Generator | None) -> tuple[Any, None]:
        """A of zeros and B normal, as PEFT's, whatever ``init`` is."""
        B = draw((base.in_features, self.rank), seeded(generator, self.init))
        dtype = self.params_dtype(base)
        A = torch.zeros(self.rank, base.out_features, dtype=dtype, device=base.device)
        return LoRAEmbeddingParams(A, B.to(base.device, dtype)), None

    def check(self, base: Base, params: Any, path: str) -> None:
        """Raise AdapterError unless ``params`` fits the layer. Any rank will do."""
        check_factors(LoRAEmbeddingParams, params, (base.out_features,), base.in_features, path)

    def apply(self, base: Any, params: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``E[x] + s B A[:, x]`` for ids x ``[...]``: ``[..., embedding_dim]``.

        An id has no element that dropout could zero: ``keep`` is None.
        """
        y: Tensor = base.linear(x)
        A, B = params
        h = base.look_up(x, A.mT) * self.scaling
        return y + F.linear(h, B).to(y.dtype)

    def apply_rows(self, base: Any, params: Any, rows: Rows, x: Tensor) -> Tensor:
        """:meth:`apply` with leaves ``[K, ...]`` and x ``[n, ...]``: a row, its adapter."""
        y: Tensor = base.linear(x)
        A, B = params
        owner = rows.ids if rows.grid is None else torch.arange(A.shape[0], device=A.device)
        h = base.look_up(x.reshape(rows.products(x), -1), A.mT, owner) * self.scaling
        update = torch.bmm(h, rows.pick(B).mT).reshape(y.shape)
        return keep_base(y + update.to(y.dtype), y, rows)

    def leaf(self, base: Base, A: Tensor, B: Tensor) -> LoRAEmbeddingParams:
        """Of factors of the table: ``E + B A`` for A ``[r, embedding_dim]``."""
        return LoRAEmbeddingParams(B.mT.contiguous(), A.mT.contiguous())

    def _delta(self, params: Any, rows: slice) -> Tensor:
        A, B = params
        delta: Tensor = (A[:, rows].mT * self.scaling) @ B.mT
        return delta


@over.register
def _(base: Embedding, method: Any, path: str) -> EmbeddingLoRA:
    is_lora(method, "an embedding", path)
    if method.lora_bias:
        raise ConfigError(
            f"layer {path!r}: lora_bias=True, and an embedding has no bias to merge one into. Use "
            "lora_bias=False, or exclude it."
        )
    values = {f.name: getattr(method, f.name) for f in fields(LoRA)}
    return EmbeddingLoRA(**values | {"dropout": 0.0})
