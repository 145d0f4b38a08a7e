"""INC's FP8 linear layers: ``PatchedLinear`` of neural-compressor-pt 3.10, in each of its states.

The numbers follow ``fp8_quant/_quant_common/helper_modules.py`` and ``_core/quant_dequant.py``.
INC's own backward casts the gradient to float8, where it vanishes below 2**-10 or so; here it is
straight through the rounding, in the high-precision dtype. On a Gaudi, where the layer has its own
FP8 GEMM, that GEMM runs; everywhere else (and under ``torch.compile``) plain torch does.
"""

import copy
import importlib
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from neural_compressor.torch.algorithms.fp8_quant._core.common import QuantTensorType
from neural_compressor.torch.algorithms.fp8_quant._core.fp_utils import get_fullscale
from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods.scales_method import (
    DummyScales,
    MaxAbsDynamicPcs,
    MaxAbsDynamicPts,
)
from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import (
    PatchedLinear,
    PatchedUnmeasuredModule,
)
from neural_compressor.torch.utils.auto_accelerator import auto_detect_accelerator
from torch import Tensor, nn

from fadapt._pytree import frozen_pytree
from fadapt.bases import fp8
from fadapt.bases.dense import check_weight_shape
from fadapt.bases.grid import Grid, requantize
from fadapt.bases.precision import autocast_input
from fadapt.bases.protocol import register_base
from fadapt.errors import UnsupportedLayerError


@dataclass(frozen=True, slots=True)
class Layer:
    """What the layer says beside its tensors.

    Attributes:
        kind: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        limit: the largest magnitude that its device keeps: 448 or 240, 57344 for e5m2.
        mode: ``"qdq"``, ``"fp8"`` (the GEMM itself in float8) or ``"fake"`` (a float weight,
            rounded at every call).
        scale_name: what the layer calls its weight's scale.
        held: that scale where the layer holds it as a number of Python, which no state of tensors
            can set; else None.
        dynamic: INC's own object that makes the activation's scale at every call, or None.
    """

    kind: torch.dtype
    limit: float
    mode: str
    scale_name: str
    held: float | None
    dynamic: Any


@frozen_pytree
@dataclass(frozen=True)
class IncFp8:
    """``y = Q(x) W + b``, ``W = weight * scale``, ``Q(x)`` x rounded to float8.

    Attributes:
        weight: float8 ``[in, out]``: INC stores it transposed.
        scale: ``[1, 1]`` (per tensor) or ``[out, 1]`` (per channel).
        dtype: the high-precision dtype of W, of the product, and of y before the bias.
        layer: the constants of the layer.
        bias: ``[out]`` or None.
        act_scale: what a step of the activation stands for, ``[1]``; None if dynamic.
        act_inverse: ``[1]``; what x is multiplied by where the layer does not divide; or None.
    """

    weight: Tensor
    scale: Tensor
    dtype: torch.dtype
    layer: Layer
    bias: Tensor | None = None
    act_scale: Tensor | None = None
    act_inverse: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def linear(self, x: Tensor) -> Tensor:
        """``Q(x) W + b``, ``[..., in] -> [..., out]``, in the dtype that the layer itself gives:
        the high-precision one, promoted with the bias's.

        The derivative is that of ``clamp(x) W``: straight through the rounding, zero where x is
        clipped.
        """
        x = autocast_input(x)
        scale, inverse = self._activation(x.detach())
        gemm = self.layer.mode == "fp8"
        scaled = gemm and not torch.compiler.is_compiling() and fp8.gaudi(x.device)
        # That GEMM rounds neither codes * scale nor its sum before the end: float32 has room.
        wide = torch.float32 if gemm and not scaled else self.dtype
        one = self.layer.dynamic is None
        static = fp8.Format(wide, wide, native=True, scaled=scaled, one=one)
        how = fp8.Rounding(self.layer.kind, self.layer.limit, wide)
        weight = (self.weight.mT, self.scale)
        y = fp8.rounded_product(x, scale, how, weight, static, inverse).to(self.dtype)
        return y if self.bias is None else y + self.bias

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``; in the base's own dtype bit for bit what INC multiplies by."""
        return fp8.dequantize(self.weight.mT, self.scale, dtype or self.dtype)

    def requantize(self, weight: Tensor, scales: str = "auto") -> "IncFp8":
        """W ``[out, in]`` on this base's grid, or on a wider one where it does not fit.

        Args:
            weight: floating ``[out, in]``.
            scales: ``"auto"`` keeps a channel's scale while the channel fits its range, so that
                an unchanged weight gives back the same bytes; one that does not fit gets
                amax / limit. ``"fresh"`` gives that to all, ``"keep"`` to none, and what does not
                fit saturates.
        """
        check_weight_shape(self, weight)
        base: IncFp8 = requantize(self, weight, scales)
        return base

    def grid(self) -> Grid:
        return fp8.grid(self.scale, self.layer.kind, self.layer.limit)

    def codes(self) -> Tensor:
        return self.weight.mT

    def on_grid(self, grid: Grid, codes: Tensor) -> "IncFp8":
        return replace(self, weight=codes.mT.contiguous(), scale=grid.scale)

    def rows(self, rows: slice) -> "IncFp8":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors."""
        return replace(
            self,
            weight=self.weight[:, rows],
            scale=self.scale if self.scale.shape[0] == 1 else self.scale[rows],
            bias=None if self.bias is None else self.bias[rows],
        )

    def state(self) -> dict[str, Tensor]:
        """``weight`` ``[in, out]``, ``bias``, and the weight's scale where the layer holds it as a
        tensor.

        Raises:
            UnsupportedLayerError: the scale is another than the layer's, which holds it as a number
                of Python: take :func:`inc_layer`.
        """
        held = self.layer.held
        if held is not None and held != float(self.scale):
            raise UnsupportedLayerError(
                f"This weight has the scale {float(self.scale):g}, and INC's layer holds its own, "
                f"{held:g}, as a number, which no state of tensors can set. Merge with "
                'scales="keep", or make a new model (fadapt.merged_model), or convert with INC\'s '
                "per-channel scales."
            )
        state = {"weight": self._stored()}
        if held is None:
            scale = self.scale.reshape(-1 if len(self.scale) > 1 else ())
            state[self.layer.scale_name] = scale
            if self.layer.mode == "fake":  # which rounds by the one and multiplies by the other
                state[self.layer.scale_name + "_inv"] = scale.reciprocal()
        return state | ({} if self.bias is None else {"bias": self.bias})

    def _stored(self) -> Tensor:
        return self.dequantize().mT if self.layer.mode == "fake" else self.weight

    def _activation(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation's scale, and what to multiply by where INC does not divide."""
        if self.act_scale is not None:
            return self.act_scale.float(), self.act_inverse
        scale = _dynamic_scale(self.layer.dynamic, x)
        return scale.float(), scale.reciprocal()


def inc_layer(base: IncFp8, layer: nn.Module) -> nn.Module:
    """A copy of INC's ``layer`` that holds ``base``, whatever its scale is held as."""
    fresh = copy.deepcopy(layer)
    fresh.weight = nn.Parameter(base._stored().detach(), requires_grad=False)
    if base.bias is not None:
        fresh.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
    *path, name = base.layer.scale_name.split(".")
    owner: Any = fresh.get_submodule(".".join(path))
    if base.layer.held is not None:
        setattr(owner, name, float(base.scale))
        if base.layer.mode == "fake":
            owner.scale_inv = 1 / float(base.scale)
        return fresh
    scale = base.scale.detach().reshape(getattr(owner, name).shape)
    setattr(owner, name, nn.Parameter(scale, requires_grad=False))
    if base.layer.mode == "fake":
        owner.scale_inv = nn.Parameter(scale.reciprocal(), requires_grad=False)
    return fresh


def _dynamic_scale(made: Any, x: Tensor) -> Tensor:
    """The scale that INC's ``made`` gives x ``[..., in]``: one, or ``[..., 1]``, in its dtype."""
    if x.device.type == "hpu":
        scale: Tensor = made.calc_scales(x, QuantTensorType.DYNAMIC)
    else:  # the op that INC's own call takes may exist on a Gaudi alone: the same without it
        reach = x.abs()
        per_row = isinstance(made, MaxAbsDynamicPcs)
        # An empty batch has no largest element: the zero stands in for it.
        whole = F.pad(reach.amax(-1).reshape(-1), (0, 1))
        amax = reach.amax(made.dim, keepdim=True) if per_row else whole.amax()
        scale = amax / (made.fullscale * made.backoff)
        rounding = made.round_scale_method
        scale = type(rounding).calc(rounding, scale if per_row else scale.to(made.hp_dtype))
    return torch.where(scale > 0, scale, 1.0)  # of zeros: INC's own is 0 * inf


def _tensor(scale: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.detach().to(device).reshape(-1)
    return torch.tensor([scale], dtype=torch.float32, device=device)


def _read(layer: PatchedLinear) -> IncFp8:
    _check(layer)
    _load_gaudi(layer.weight.device)
    weight, quant, device = layer.weight.detach(), layer.quant_input, layer.weight.device
    if layer.use_qdq:
        mode, name = "qdq", "dequant_weights.scale"
    elif layer.fake_quant:
        mode, name = "fake", "qdq_weights.scale"
    else:
        mode, name = "fp8", "scale_weight"
    *path, last = name.split(".")
    found = getattr(layer.get_submodule(".".join(path)), last)
    scale = _tensor(found, device).unsqueeze(-1)
    kind, hp = layer.lp_dtype, layer.hp_dtype
    act_scale = act_inverse = made = None
    if layer.is_dynamic_quantization:
        made = quant.input_scales_creator
        if isinstance(made, DummyScales):  # of a layer that INC's load() made: always 1
            act_scale = act_inverse = torch.ones(1, device=device)
            made = None
        elif not isinstance(made, (MaxAbsDynamicPts, MaxAbsDynamicPcs)):
            raise UnsupportedLayerError(
                f"An INC layer whose dynamic scales are made by {type(made).__name__}; fadapt "
                "reads MaxAbsDynamicPts and MaxAbsDynamicPcs. Choose another scale_method."
            )
    elif mode == "qdq":
        act_scale = _tensor(quant.scale, device)
    else:
        act_scale = _tensor(quant.scale if mode == "fake" else layer.scale_input, device)
        act_inverse = _tensor(quant.scale_inv, device)
    if act_scale is not None and act_scale.numel() != 1:
        raise UnsupportedLayerError(
            f"An INC layer with {act_scale.numel()} activation scales (SmoothQuant); fadapt reads "
            "one for the tensor, or dynamic ones. Choose another scale_method."
        )
    limit = _limit(layer)
    if mode == "fake":  # the layer rounds this float weight at every call; here it is done once
        steps = weight * _tensor(layer.qdq_weights.scale_inv, device).to(weight.dtype)
        weight = steps.float().clamp(-limit, limit).to(kind)
    return IncFp8(
        weight=weight,
        scale=scale,
        dtype=hp,
        layer=Layer(kind, limit, mode, name, found if isinstance(found, float) else None, made),
        bias=None if layer.bias is None else layer.bias.detach(),
        act_scale=act_scale,
        act_inverse=act_inverse,
    )


def _check(layer: PatchedLinear) -> None:
    mode = layer.quantization_mode.name
    if mode in ("MEASURE", "SHAPE"):
        raise UnsupportedLayerError(
            f"An INC layer in its {mode.lower()} mode, which still holds a float weight and writes "
            "to its observers at every call. Run calibration data through the model, then "
            "neural_compressor.torch.quantization.convert(model), and read that."
        )
    if mode not in ("QUANTIZE", "LOAD") or layer.weight.dim() != 2:
        raise UnsupportedLayerError(
            f"An INC layer in mode {mode} with a weight of shape {list(layer.weight.shape)}; "
            "fadapt reads converted linears, [in, out]."
        )


def _limit(layer: PatchedLinear) -> float:
    own = getattr(layer.quant_input, "quant_max", None)  # of QDQ layers: their device's
    if own is not None:
        return float(own)
    return get_fullscale(  # type: ignore[no-any-return]
        layer.lp_dtype, auto_detect_accelerator().get_inc_accelerator_type()
    )


def _load_gaudi(device: torch.device) -> None:
    """Habana's bridge registers its GEMM when it is imported; only its own machines have it."""
    if device.type == "hpu" and importlib.util.find_spec("habana_frameworks"):
        importlib.import_module("habana_frameworks.torch")


def _unmeasured(layer: PatchedUnmeasuredModule) -> IncFp8:
    raise UnsupportedLayerError(
        f"INC's layer {layer.name!r} was never measured, so convert() left nothing in it to run. "
        "Run calibration data through every layer before convert(), or name it in FP8Config's "
        "blocklist."
    )


register_base(PatchedLinear, _read)
register_base(PatchedUnmeasuredModule, _unmeasured)
