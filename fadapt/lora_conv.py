"""LoRA over a convolution: ``y = W * x + b + s B (A * x)``, as PEFT's ``lora.Conv2d`` has it.

A slides over the input as the layer's own kernel does, and B mixes the r channels that it gives.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fadapt.bases import Base, Conv
from fadapt.bases.conv import SLIDE
from fadapt.errors import AdapterError, ConfigError
from fadapt.lora import LoRA, LoRAParams, Params, check_factors, is_lora
from fadapt.method import over
from fadapt.rows import Rows, keep_base


class ConvLoRA(LoRA):
    """:class:`fadapt.LoRA` as it stands at a convolution: ``lora_A [r, in, *kernel]``, ``lora_B
    [out, r]``."""

    def init_layer(
        self, base: Any, generator: torch.Generator | None
    ) -> tuple[Params, Base | None]:
        """LoRA's, by the size of a patch."""
        if self.init not in ("kaiming", "gaussian"):
            raise ConfigError(
                f"init={self.init!r} is for linear layers; a convolution takes kaiming or gaussian."
            )
        fresh, none = super().init_layer(base, generator)
        return fresh._replace(lora_A=fresh.lora_A.reshape(-1, *base.patch)), none

    def check(self, base: Any, params: Any, path: str) -> None:
        """Raise AdapterError unless ``params`` fits the layer. Any rank will do."""
        check_factors(self.params_type, params, tuple(base.patch), base.out_features, path)

    def apply(self, base: Any, params: Params, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``W * x + b + s B (A * x)`` for x ``[n, in, *size]``, n left out or not.

        Args:
            base: the frozen layer.
            params: its parameters; the update is computed in their dtype.
            x: as the layer takes it.
            keep: boolean, shaped as x: which elements of A's input dropout lets through.
        """
        y: Tensor = base.linear(x)
        h = x.to(params.lora_A.dtype)
        if keep is not None:
            h = h * keep / (1 - self.dropout)
        return y + self._update(base, h, *params).to(y.dtype)

    def apply_rows(self, base: Any, params: Params, rows: Rows, x: Tensor) -> Tensor:
        """:meth:`apply` with leaves ``[K, ...]`` and x ``[n, in, *size]``: a row, its adapter."""
        if x.dim() != 1 + len(base.patch):
            raise AdapterError(
                f"a mixed batch through a convolution is [n, in, *size], a row an adapter; got "
                f"{list(x.shape)}."
            )
        y: Tensor = base.linear(x)
        h = x.to(params.lora_A.dtype)
        if torch.compiler.is_exporting():
            moved = self._selected(base, h, rows, *params).reshape(y.shape)
        else:
            h = h.reshape(rows.products(x), -1, *x.shape[1:])
            update = torch.func.vmap(lambda h, *leaf: self._update(base, h, *leaf))
            moved = update(h, *(rows.pick(t) for t in params)).reshape(y.shape)
        return keep_base(y + moved.to(y.dtype), y, rows)

    def leaf(self, base: Any, A: Tensor, B: Tensor) -> LoRAParams:
        """Of factors of W: A ``[r, in x kernel]``."""
        return LoRAParams(A.reshape(-1, *base.patch), B)

    def _update(
        self, base: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        h = base.slide(x, A) * self.scaling
        mixed: Tensor = SLIDE[A.dim()](h, B.reshape(*B.shape, *[1] * (A.dim() - 2)))
        if bias is None:
            return mixed
        return mixed + (bias * self.scaling).reshape(-1, *[1] * (A.dim() - 2))

    def _selected(
        self, base: Any, x: Tensor, rows: Rows, A: Tensor, B: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """:meth:`_update` of a batch of any size, which a graph cannot cut into groups: every
        adapter's A slides over every row, and each takes its own."""
        assert rows.ids is not None
        every = base.slide(x, A.flatten(0, 1)).unflatten(1, A.shape[:2])
        h = every[torch.arange(x.shape[0], device=x.device), rows.ids].flatten(2) * self.scaling
        moved = torch.bmm(rows.pick(B), h)
        return moved if bias is None else moved + rows.pick(bias * self.scaling).unsqueeze(-1)

    def _delta(self, params: Any, rows: slice) -> Tensor:
        delta: Tensor = (params.lora_B[rows] * self.scaling) @ params.lora_A.flatten(1)
        return delta


@over.register
def _(base: Conv, method: Any, path: str) -> ConvLoRA:
    is_lora(method, "a convolution", path)
    return ConvLoRA(**{f.name: getattr(method, f.name) for f in fields(LoRA)})
