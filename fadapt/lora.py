"""LoRA, whole: ``y = W x + b + s B A x`` (Hu et al. 2021, arXiv:2106.09685, equation 3).

Parameters, hyperparameters, initialisation, forward: all that LoRA is, over any base. Its form over
a convolution is in ``lora_conv.py``, over an embedding in ``lora_embedding.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fadapt.bases import Base
from fadapt.errors import AdapterError, ConfigError
from fadapt.random import draw
from fadapt.rows import Rows, add_low_rank
from fadapt.targets import ALL_LINEAR, normalize_targets, pattern_values

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")


class LoRAParams(NamedTuple):
    """``lora_A [r, in]`` and ``lora_B [out, r]``, in one floating dtype."""

    lora_A: Tensor
    lora_B: Tensor


class LoRABiasParams(NamedTuple):
    """As :class:`LoRAParams`, and ``lora_bias [out]``."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor


Params = LoRAParams | LoRABiasParams


@dataclass(frozen=True)
class LoRA:
    """LoRA's hyperparameters. Names and defaults are PEFT's, less its prefixes.

    Args:
        rank: r, at least 1.
        alpha: the update is scaled by ``alpha / rank``; None means ``alpha = rank``.
        targets: which layers (see :func:`fadapt.targets.find_targets`).
        exclude: which of them not.
        layers_to_transform: indices of the blocks to adapt; all, if empty.
        layers_pattern: names of the lists of blocks that those indices count in.
        rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732, eq. 4).
        dropout: probability of zeroing an element of A's input, in [0, 1). It acts only in a
            forward that is given ``dropout=``.
        lora_bias: learn a bias ``[out]`` beside B, scaled like the update.
        rank_pattern: ``{regular expression for the end of a path: rank}``.
        alpha_pattern: ``{regular expression for the end of a path: alpha}``.
        init: ``"kaiming"`` (A uniform in ±1/sqrt(in), B = 0), ``"gaussian"`` (A normal with
            std 1/r, B = 0), ``"orthogonal"`` (B A = 0 with neither zero), ``"pissa"`` (Meng et al.
            2024, arXiv:2404.02948) or ``"olora"`` (Büyükakyüz 2024, arXiv:2406.01775).
        modules_to_save: modules trained whole, beside the adapters. Their parameters, and biases
            that are trained, may be of a wider dtype than the model's (float32 of a bfloat16
            model's): they are cast to it in each call, as they are when PEFT loads them.
        dtype: of the parameters; None means float32 (float64 over a float64 base).
        bias: which of the model's biases are trained too: ``"none"``, those of the adapted layers
            (``"adapter_only"``), or every module's ``bias`` (``"all"``). They are entries of the
            adapter: ``{"bias": ...}`` at the path of the module, of an adapted layer at
            ``path.base_layer``.

    Raises:
        ConfigError: a value out of range, or an unknown ``init`` or ``bias``.

    Example:
        >>> import fadapt
        >>> fadapt.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"]).scaling
        2.0
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | Sequence[str] = ALL_LINEAR
    exclude: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    rslora: bool = False
    dropout: float = 0.0
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    init: str = "kaiming"
    modules_to_save: Sequence[str] = ()
    dtype: torch.dtype | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        normalize_targets(self)
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank must be an integer of at least 1, got {rank!r}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not math.isfinite(alpha):
                raise ConfigError(f"alpha must be a finite number, got {alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if self.init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(INITS)}; got {self.init!r}.")
        if self.init == "orthogonal" and any(
            r % 2 for r in (self.rank, *self.rank_pattern.values())
        ):
            raise ConfigError(f"init='orthogonal' needs an even rank, got {self.rank}.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating-point dtype, got {self.dtype}.")

    @property
    def scaling(self) -> float:
        """What ``B A`` is multiplied by: ``alpha / rank``, or ``alpha / sqrt(rank)``."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def params_type(self) -> type[LoRAParams] | type[LoRABiasParams]:
        """The NamedTuple of one layer's parameters."""
        return LoRABiasParams if self.lora_bias else LoRAParams

    @property
    def prepared_type(self) -> type[LoRAParams] | type[LoRABiasParams]:
        """The same: there is nothing to prepare."""
        return self.params_type

    def at(self, paths: Sequence[str]) -> dict[str, "LoRA"]:
        """The hyperparameters of each layer, the patterns applied.

        Raises:
            TargetError: a key of a pattern matches none of the paths.
        """
        if not self.rank_pattern and not self.alpha_pattern:
            return dict.fromkeys(paths, self)
        ranks = pattern_values(self.rank_pattern, paths, "rank_pattern")
        alphas = pattern_values(self.alpha_pattern, paths, "alpha_pattern")
        plain = replace(self, rank_pattern={}, alpha_pattern={})
        return {
            p: replace(plain, rank=ranks.get(p, self.rank), alpha=alphas.get(p, self.alpha))
            for p in paths
        }

    def params_dtype(self, base: Base) -> torch.dtype:
        """Of one layer's parameters."""
        return self.dtype or (torch.float64 if base.dtype == torch.float64 else torch.float32)

    def init_layer(
        self, base: Base, generator: torch.Generator | None
    ) -> tuple[Params, Base | None]:
        """One layer's fresh parameters; and for PiSSA and OLoRA the base that they need.

        Args:
            base: the layer's base.
            generator: where numbers are drawn; PiSSA and OLoRA draw none.
        """
        dtype = self.params_dtype(base)
        residual: Base | None = None
        if self.init in ("pissa", "olora"):
            A, B = self._factors(base)
            # Rounded to the parameters' dtype first: the residual then makes up for that too.
            A, B = A.to(dtype), B.to(dtype)
            delta = (B.double() @ A.double()) * self.scaling
            wide = torch.promote_types(base.dtype, torch.float32)
            residual = base.requantize((base.dequantize(wide).double() - delta).to(wide))
        else:
            A, B = self._drawn(base, seeded(generator, self.init))
            A, B = A.to(base.device, dtype), B.to(base.device, dtype)
        if self.lora_bias:
            bias = torch.zeros(base.out_features, dtype=dtype, device=base.device)
            return LoRABiasParams(A, B, bias), residual
        return LoRAParams(A, B), residual

    def _drawn(self, base: Base, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        r, n_in, n_out = self.rank, base.in_features, base.out_features
        zeros = torch.zeros(n_out, r)
        if self.init == "kaiming":
            # kaiming_uniform with a = sqrt(5), as nn.Linear and loralib: the bound is 1/sqrt(in).
            return (2 * draw((r, n_in), generator, "uniform") - 1) / math.sqrt(n_in), zeros
        if self.init == "gaussian":
            return draw((r, n_in), generator) / r, zeros
        # PEFT's orthogonal_init: A and B live in complementary halves of one orthogonal matrix.
        q, _ = torch.linalg.qr(draw((r, r), generator))
        A = (draw((n_in, r // 2), generator) @ q[0::2]).T / 10
        B = draw((n_out, r // 2), generator) @ q[1::2] / 10
        return A.contiguous(), B

    def _factors(self, base: Base) -> tuple[Tensor, Tensor]:
        weight = base.dequantize(torch.promote_types(base.dtype, torch.float32))
        r = self.rank
        if r > min(weight.shape):
            raise ConfigError(
                f"init={self.init!r} takes rank {r} of a weight of shape {tuple(weight.shape)}: "
                f"the rank can be at most {min(weight.shape)}."
            )
        if self.init == "olora":
            q, upper = torch.linalg.qr(weight)
            return upper[:r].contiguous(), q[:, :r].contiguous()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:r] / self.scaling).sqrt()
        return root[:, None] * vh[:r], u[:, :r] * root

    def check(self, base: Base, params: Any, path: str) -> None:
        """Raise AdapterError unless ``params`` fits the layer. Any rank will do."""
        check_factors(self.params_type, params, (base.in_features,), base.out_features, path)

    def prepare(
        self, params: Mapping[str, Any], bases: Mapping[str, Base] | None = None
    ) -> Mapping[str, Any]:
        """``params`` as they are."""
        return params

    def keep_shape(self, params: Params, x: Tensor) -> torch.Size:
        """Of dropout's mask: that of A's input."""
        return x.shape

    def apply(self, base: Base, params: Params, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``W x + b + s B A x`` for x ``[..., in]``: ``[..., out]`` in the base's result dtype.

        Args:
            base: the frozen layer.
            params: its parameters; the update is computed in their dtype.
            x: ``[..., in]``.
            keep: boolean, shaped as x: which elements of A's input dropout lets through.
        """
        y = base.linear(x)
        A, B = params.lora_A, params.lora_B
        h = x.to(A.dtype)
        if keep is not None:
            h = h * keep / (1 - self.dropout)
        h = F.linear(h, A)
        if self.scaling != 1:
            h = h * self.scaling  # on [..., r], the smallest tensor there is here
        update = F.linear(h, B)
        if isinstance(params, LoRABiasParams):
            update = update + params.lora_bias * self.scaling
        return y + update.to(y.dtype)

    def apply_rows(self, base: Base, params: Params, rows: Rows, x: Tensor) -> Tensor:
        """:meth:`apply` with leaves ``[K, ...]`` and x ``[n, ..., in]``: a row, its adapter."""
        A, B, bias = params.lora_A, params.lora_B, getattr(params, "lora_bias", None)
        return add_low_rank(base.linear(x), x.to(A.dtype), A, B, rows, self.scaling, bias)

    def merge(self, weight: Tensor, params: Params, rows: slice = slice(None)) -> Tensor:
        """``W + s B A``, for the rows ``rows`` of W that ``weight [rows, in]`` holds.

        Computed and returned in the wider of the two dtypes.
        """
        return weight + self._delta(params, rows)

    def unmerge(self, weight: Tensor, params: Params, rows: slice = slice(None)) -> Tensor:
        """``W - s B A``: the inverse of :meth:`merge`, up to rounding."""
        return weight - self._delta(params, rows)

    def merge_bias(self, bias: Tensor | None, params: Params) -> Tensor | None:
        """``b + s lora_bias``; ``b`` itself without a learned bias."""
        if not isinstance(params, LoRABiasParams):
            return bias
        update = params.lora_bias * self.scaling
        return update if bias is None else bias + update

    def unmerge_bias(self, bias: Tensor | None, params: Params) -> Tensor | None:
        """The inverse of :meth:`merge_bias`, up to rounding."""
        if bias is None or not isinstance(params, LoRABiasParams):
            return bias
        return bias - params.lora_bias * self.scaling

    def leaf(self, base: Base, A: Tensor, B: Tensor) -> Any:
        """One layer's parameters of the factors of an update ``B A`` of ``base``'s matrix."""
        return LoRAParams(A, B)

    def _delta(self, params: Any, rows: slice) -> Tensor:
        delta: Tensor = (params.lora_B[rows] * self.scaling) @ params.lora_A
        return delta


def seeded(generator: torch.Generator | None, init: str) -> torch.Generator:
    """The generator, which must be there."""
    if generator is None:
        raise ConfigError(
            f"init={init!r} draws random numbers: pass "
            "generator=torch.Generator().manual_seed(...). The global one is never read."
        )
    return generator


def check_factors(kind: Any, params: Any, row: tuple[int, ...], out: int, path: str) -> None:
    """Raise AdapterError unless ``params`` is of ``kind``, its A ``[r, *row]``, its B ``[out, r]``,
    both of one floating dtype, and a bias ``[out]``."""
    if getattr(params, "_fields", None) != kind._fields:
        raise AdapterError(
            f"layer {path!r}: expected a {kind.__name__} {kind._fields}, got "
            f"{type(params).__name__}. Make parameters with fadapt.init or fadapt.load_peft."
        )
    A, B = params[:2]
    a, b = kind._fields[:2]
    if (
        A.dim() != 1 + len(row)
        or B.dim() != 2
        or tuple(A.shape[1:]) != row
        or B.shape[0] != out
        or A.shape[0] != B.shape[1]
    ):
        sizes = ", ".join(map(str, row))
        stacked = A.dim() == 2 + len(row)
        hint = " A stack goes through torch.func.vmap(forward, (0, ...))." if stacked else ""
        raise AdapterError(
            f"layer {path!r}: expected {a} [r, {sizes}] and {b} [{out}, r], got {a} "
            f"{list(A.shape)} and {b} {list(B.shape)}.{hint}"
        )
    if not (A.dtype == B.dtype and A.dtype.is_floating_point):
        raise AdapterError(
            f"layer {path!r}: {a} and {b} must share one floating dtype, got {A.dtype} and "
            f"{B.dtype}."
        )
    for name, bias in zip(kind._fields[2:], params[2:], strict=True):
        if bias.shape != (out,) or not bias.dtype.is_floating_point:
            raise AdapterError(
                f"layer {path!r}: expected {name} [{out}], floating, got {bias.dtype} "
                f"{list(bias.shape)}."
            )


def is_lora(method: Any, layer: str, path: str) -> None:
    """Raise ConfigError unless the method's update is LoRA's own: DoRA's, OFT's and a subclass's
    are for linear layers."""
    if not isinstance(method, LoRA) or type(method).apply is not LoRA.apply:
        raise ConfigError(
            f"layer {path!r} is {layer}, and {type(method).__name__} adapts linear layers alone. "
            "LoRA takes it; or exclude it."
        )
