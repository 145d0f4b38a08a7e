"""DoRA, whole: ``y = m (W + s B A) x / |W + s B A| + b`` (Liu et al. 2024, arXiv:2402.09353,
equation 5): LoRA for the direction of each neuron, and a learned magnitude.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.bases import Base
from fadapt.bases.precision import without_autocast
from fadapt.errors import AdapterError, ConfigError
from fadapt.kernels.eager import readable, usable
from fadapt.lora import LoRA, LoRAParams
from fadapt.rows import Rows, add_low_rank, keep_base

# How much of W is dequantized at a time to take its norm.
_BLOCK_BYTES = {"cpu": 2**21}
_BLOCK_BYTES_ELSEWHERE = 2**26
# Inputs up to which W + s B A is taken whole: it is small, and where an update all but cancels a
# row of so few numbers, the difference of squares has no digits left.
_NARROW = 4


class DoRAParams(NamedTuple):
    """``lora_A [r, in]``, ``lora_B [out, r]`` and ``lora_magnitude [out]``, in one dtype."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude: Tensor


class DoRANormed(NamedTuple):
    """As :class:`DoRAParams`, and ``norm [out]``, the row norms of ``W + s B A``, which
    :meth:`DoRA.prepare` took. A forward takes it in place of :class:`DoRAParams`."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude: Tensor
    norm: Tensor


Params = DoRAParams | DoRANormed


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA's hyperparameters: those of :class:`fadapt.LoRA`, less ``lora_bias``.

    The norm is a constant to every derivative, as the paper has it (section 4.3). Dropout acts on
    A's input alone.

    Raises:
        ConfigError: as LoRA does; or ``lora_bias=True``.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.DoRA(rank=2)
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(params[""].lora_magnitude, model.weight.norm(dim=1))
        True
        >>> forward, x = fadapt.bind(model, method), torch.ones(2, 4)
        >>> torch.equal(forward(params, x), model(x))
        True
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ConfigError("DoRA has no lora_bias: a magnitude of a bias is not defined.")

    @property
    def params_type(self) -> Any:
        """The NamedTuple of one layer's parameters."""
        return DoRAParams

    @property
    def prepared_type(self) -> Any:
        """The NamedTuple that :meth:`prepare` makes of it."""
        return DoRANormed

    def init_layer(self, base: Base, generator: torch.Generator | None) -> tuple[Any, Base | None]:
        """LoRA's, and the norms of the base's rows."""
        fresh, residual = super().init_layer(base, generator)
        norm = self.norm(residual or base, fresh)
        return DoRAParams(fresh.lora_A, fresh.lora_B, norm.to(fresh.lora_A.dtype)), residual

    def check(self, base: Base, params: Any, path: str) -> None:
        """Raise AdapterError unless ``params`` fits the layer. Any rank will do."""
        fields = getattr(params, "_fields", None)
        if fields not in (DoRAParams._fields, DoRANormed._fields):
            raise AdapterError(
                f"layer {path!r}: expected DoRAParams {DoRAParams._fields} or what prepare made of "
                f"them, got {type(params).__name__}. Make parameters with fadapt.init or "
                "fadapt.load_peft."
            )
        A, B, *rest = params
        _PLAIN.check(base, LoRAParams(A, B), path)
        for name, tensor in zip(fields[2:], rest, strict=True):
            if tensor.shape != (base.out_features,):
                raise AdapterError(
                    f"layer {path!r}: expected {name} [{base.out_features}], got "
                    f"{list(tensor.shape)}."
                )
            if not tensor.dtype.is_floating_point:
                raise AdapterError(f"layer {path!r}: {name} must be floating, got {tensor.dtype}.")

    def prepare(
        self, params: Mapping[str, Any], bases: Mapping[str, Base] | None = None
    ) -> dict[str, Any]:
        """Take the norms ``|W + s B A|`` of every layer.

        Each forward does that by itself. A caller that runs several with the same parameters does
        it once: ``forward.prepare(params)``.

        Args:
            params: an adapter, ``{path: DoRAParams}``; other leaves are passed on.
            bases: ``{path: base}``, of each of those layers.

        Returns:
            ``{path: DoRANormed}``, which a forward takes in place of ``params``.
        """
        paths = [path for path, leaf in params.items() if isinstance(leaf, DoRAParams)]
        if not paths:
            return dict(params)
        bases = bases or {}
        at: dict[str, Any] = dict(self.at(list(bases)))
        prepared = dict(params)
        for path in paths:
            A, B, magnitude = params[path]
            prepared[path] = DoRANormed(A, B, magnitude, at[path].norm(bases[path], params[path]))
        return prepared

    def norm(self, base: Base, params: Any) -> Tensor:
        """``|W + s B A|`` of each row, ``[out]``, float32 at least, whatever autocast; detached.

        By ``|W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>`` over blocks of W's rows: neither W nor
        B A is ever whole, and under ``vmap`` over adapters W is read once.
        """
        with without_autocast(params.lora_A):
            return self._norm(base, params)

    def _norm(self, base: Base, params: Any) -> Tensor:
        kind = torch.promote_types(params.lora_A.dtype, torch.float32)
        kernels = _kernels(params)
        if kernels is not None:
            A, B = params.lora_A.detach(), params.lora_B.detach()
            norms = []
            for rows, part in _row_blocks(base, kind):
                weight = part.dequantize(kind)
                of_rows = B if part is base else B[rows]
                norms.append(kernels.row_norms(weight, _squares(weight), A, of_rows, self.scaling))
            return norms[0] if len(norms) == 1 else torch.cat(norms)
        A, B = params.lora_A.detach().to(kind), params.lora_B.detach().to(kind).mT
        if base.in_features <= _NARROW:
            whole = base.dequantize(kind) + (B.mT * self.scaling) @ A
            norm: Tensor = torch.linalg.vector_norm(whole, dim=-1)
            return norm.detach()

        def measured(part: Base) -> tuple[Tensor, Tensor]:
            weight = part.dequantize(kind)
            return _squares(weight), F.linear(A, weight)

        if torch._C._are_functorch_transforms_active():
            # W itself may be mapped over, under another adapter, and what is not cannot hold it.
            each = [measured(part) for _, part in _row_blocks(base, kind)]
            squares = torch.cat([square for square, _ in each], -1)
            products = torch.cat([product for _, product in each], -1)
        else:
            # Written in place: small results kept between large blocks would fragment the heap.
            squares = torch.empty(base.out_features, dtype=kind, device=base.device)
            products = torch.empty_like(B)
            for rows, part in _row_blocks(base, kind):
                squares[rows], products[..., rows] = measured(part)
        s = self.scaling
        cross = products * (2 * s) + (A @ A.mT) @ B * s**2
        # What is negative, by rounding, is 0: a row that the update cancels.
        norm = (squares + (B * cross).sum(-2)).clamp(min=0).sqrt()
        return norm.detach()

    def apply(self, base: Base, params: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``m (W + s B A) x / |W + s B A| + b`` for x ``[..., in]``: ``[..., out]``.

        Args:
            base: the frozen layer.
            params: its parameters, or what was prepared of them; the update is in their dtype.
            x: ``[..., in]``.
            keep: boolean, shaped as x: which elements of A's input dropout lets through.
        """
        y = base.linear(x)
        norm = params.norm if isinstance(params, DoRANormed) else self.norm(base, params)
        dtype = params.lora_A.dtype
        h = x.to(dtype)
        if keep is not None:
            h = h * keep / (1 - self.dropout)
        h = F.linear(h, params.lora_A)
        if self.scaling != 1:
            h = h * self.scaling
        update = F.linear(h, params.lora_B)
        factor = _factor(params.lora_magnitude, norm).to(dtype)
        plain = y.to(dtype)
        if base.bias is not None:
            plain = plain - base.bias.to(dtype)
        return y + torch.addcmul((factor - 1) * plain, factor, update).to(y.dtype)

    def apply_rows(self, base: Base, params: Any, rows: Rows, x: Tensor) -> Tensor:
        """:meth:`apply` with leaves ``[K, ...]`` and x ``[n, ..., in]``: a row, its adapter."""
        y = base.linear(x)
        A, B = params.lora_A, params.lora_B
        plain = y.to(A.dtype)
        if base.bias is not None:
            plain = plain - base.bias.to(A.dtype)
        moved = add_low_rank(plain, x.to(A.dtype), A, B, rows, self.scaling)
        factor = rows.take(_factor(params.lora_magnitude, params.norm).to(A.dtype), y)
        return keep_base(y + (factor * moved - plain).to(y.dtype), y, rows)

    def merge(self, weight: Tensor, params: Any, rows: slice = slice(None)) -> Tensor:
        """``m (W + s B A) / |W + s B A|``, for the rows ``rows`` of W ``[rows, in]``.

        Computed and returned in the wider of the two dtypes, float32 at least.
        """
        kind = torch.promote_types(params.lora_A.dtype, torch.float32)
        moved = weight.to(torch.promote_types(kind, weight.dtype)) + self._delta(params, rows)
        if isinstance(params, DoRANormed):
            norm = params.norm[rows]
        else:
            norm = torch.linalg.vector_norm(moved, dim=-1)
        return _factor(params.lora_magnitude[rows], norm)[:, None] * moved

    def unmerge(self, weight: Tensor, params: Any, rows: slice = slice(None)) -> Tensor:
        """``W' |W + s B A| / m - s B A``: the inverse of :meth:`merge`, up to rounding.

        Raises:
            AdapterError: without the norms, which merging has divided out of W' for good.
        """
        if not isinstance(params, DoRANormed):
            raise AdapterError(
                "DoRA's merge divides the norms |W + s B A| out of the weight, so they cannot be "
                "told from it. Unmerge with what forward.prepare(params) of the unmerged model "
                "returned, which holds them."
            )
        if bool((params.lora_magnitude[rows] == 0).any()):
            raise AdapterError("a row whose magnitude is 0 was merged to zeros: nothing is left.")
        kind = torch.promote_types(params.lora_A.dtype, torch.float32)
        wide = weight.to(torch.promote_types(kind, weight.dtype))
        factor = _factor(params.lora_magnitude[rows], params.norm[rows])
        return wide / factor[:, None] - self._delta(params, rows)


# LoRA's own check reads no field of the method.
_PLAIN = LoRA()


def _factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``m / norm``; 1 for a row of zeros, which has no direction that m could scale."""
    whole = norm > 0
    return torch.where(whole, magnitude / torch.where(whole, norm, 1.0), 1.0)


def _squares(weight: Tensor) -> Tensor:
    """``|W|^2`` of each row. A square's root is the number itself, so the norm of a fresh adapter
    is the same by whichever path."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=-1)
    return norms.square()


def _kernels(params: Any) -> Any:
    """The GPU's kernels, where they take these parameters: nothing is to be differentiated or
    mapped."""
    A, B = params.lora_A, params.lora_B
    if torch._C._are_functorch_transforms_active() or not usable(A, B) or not readable(A, B):
        return None
    from fadapt.kernels import dora_gpu

    return dora_gpu if dora_gpu.takes(A, B) else None


def _row_blocks(base: Base, kind: torch.dtype) -> Iterator[tuple[slice, Base]]:
    limit = _BLOCK_BYTES.get(base.device.type, _BLOCK_BYTES_ELSEWHERE)
    step = max(1, math.ceil(limit / (base.in_features * kind.itemsize)))
    if step >= base.out_features:
        yield slice(None), base
        return
    for start in range(0, base.out_features, step):
        rows = slice(start, min(start + step, base.out_features))
        yield rows, base.rows(rows)
