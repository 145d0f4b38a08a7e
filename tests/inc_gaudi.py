"""INC's layers in the states that only a Gaudi runs, built by INC's own classes on a CPU.

INC refuses these states on a CPU in one place, where it parses a configuration. Behind it, its
scale methods, its quantizers and ``PatchedLinear`` build any state, and call the ops of Habana's
bridge. :func:`gaudi` registers those ops for CPU tensors, so that INC's own forward runs: with the
bridge's own schemas (HabanaAI/gaudi-pytorch-bridge, ``custom_ops``), and with the arithmetic to
which the bridge's own tests hold the device (``test_cast_to_fp8_v2``: the product with the scale
in the input's dtype, round to even, saturating at 240 on a Gaudi 2; ``test_fp8_gemm_v2``; and
``test_hpu_calculate_scale_for_cast``). That is a reading of the device, not the device: nothing
here has run on one. It shares no code with fadapt: rounding is a search among the format's values,
products are taken in float64.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import inc_layers
import pytest
import torch
from neural_compressor.torch.algorithms.fp8_quant._core import patching_common, quantize, scale
from neural_compressor.torch.algorithms.fp8_quant._core.quantized_func_wrappers import (
    quantized_func_wrapper,
)
from neural_compressor.torch.algorithms.fp8_quant._core.quantized_func_wrappers.hpu import (
    hpu_quantized_func_wrapper,
)
from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import scale_method_config
from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import PatchedLinear
from neural_compressor.torch.algorithms.fp8_quant._quant_common.quant_config import (
    Fp8cfg,
    ScaleFormat,
    set_hqt_config,
)
from neural_compressor.torch.algorithms.fp8_quant.model_configs import (
    PATCHED_MODULE_TABLE,
    ModuleConfig,
)
from neural_compressor.torch.utils.auto_accelerator import CPU_Accelerator, INCAcceleratorType
from torch import Tensor, nn

from fadapt.bases import inc_fp8

GAUDI2, GAUDI3 = INCAcceleratorType.GAUDI2, INCAcceleratorType.GAUDI3
SCHEMAS = (
    "cast_to_fp8_v2(Tensor input, Tensor? scale=None, bool stochastic_rounding=False, "
    "bool is_amax=False, ScalarType dtype=None, int[]? scale_shape=None) -> (Tensor, Tensor)",
    "cast_to_fp8_v2.scalar(Tensor input, float scale, bool stochastic_rounding=False, "
    "bool is_amax=False, ScalarType dtype=None, int[]? scale_shape=None) -> (Tensor, Tensor)",
    "cast_from_fp8(Tensor input, Tensor? scale, ScalarType out_dtype, "
    "int[]? scale_shape=None) -> Tensor",
    "fp8_gemm_v2(Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, ScalarType out_dtype, "
    "Tensor? A_scale_inv=None, Tensor? B_scale_inv=None, Tensor? bias=None, "
    "bool accumulate=False, int[]? B_scale_shape=None) -> Tensor",
    "fp8_gemm_v2.scalar(Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, "
    "ScalarType out_dtype, float A_scale_inv, float B_scale_inv, Tensor? bias=None, "
    "bool accumulate=False, int[]? B_scale_shape=None) -> Tensor",
    "calculate_scale_for_cast(Tensor input, int maxMode, int scaleMode, int reduceAxis=0, "
    "bool reduceKeepdim=False, float fullscale=1., float backoff=1.) -> Tensor",
)


def nearest(values: Tensor, kind: torch.dtype, limit: float) -> Tensor:
    """``values`` rounded to numbers of ``kind`` up to ``limit``: the closest, of two the even."""
    table = torch.arange(128, dtype=torch.uint8).view(kind).double()
    table = table[table <= limit]  # in ascending order: an index is a code; NaN and inf drop out
    size = values.double().abs().clamp(max=limit)
    above = torch.searchsorted(table, size).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - size, size - table[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (table[code] * values.double().sign()).to(kind)


class Device(CPU_Accelerator):
    """INC's accelerator of CPU tensors, naming itself a Gaudi; its methods are the bridge's ops.

    The dispatcher leaves out what an op is given by default: no bias, nothing accumulated.
    """

    def __init__(self, kind: INCAcceleratorType):
        super().__init__()
        self.kind = kind
        self.gemms: list[tuple[Any, ...]] = []  # the arguments of each fp8_gemm_v2

    def get_inc_accelerator_type(self) -> INCAcceleratorType:
        return self.kind

    def limit(self, kind: torch.dtype) -> float:
        if kind == torch.float8_e4m3fn and self.kind == GAUDI2:
            return 240.0
        return torch.finfo(kind).max

    def cast_to_fp8_v2(
        self, x: Tensor, scale: Any, stochastic: bool, amax: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        assert x.dtype in (torch.float32, torch.bfloat16), f"the op takes no {x.dtype}"
        assert not stochastic
        assert not amax
        scale = torch.as_tensor(1.0 if scale is None else scale).to(x.dtype)
        return nearest(x * scale, dtype, self.limit(dtype)), x.new_empty(0)

    def cast_from_fp8(self, x: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
        assert dtype in (torch.float32, torch.bfloat16), f"the op gives no {dtype}"
        return x.to(dtype) * torch.as_tensor(scale).to(dtype)

    def fp8_gemm_v2(
        self,
        a: Tensor,
        trans_a: bool,
        b: Tensor,
        trans_b: bool,
        d: Tensor | None,
        dtype: torch.dtype,
        scale_a: Any,
        scale_b: Any,
    ) -> Tensor:
        assert (trans_a, trans_b) == (False, False)
        scale_a, scale_b = torch.as_tensor(scale_a).double(), torch.as_tensor(scale_b).double()
        self.gemms.append((a, b, dtype, scale_a, scale_b))
        return ((a.double() * scale_a) @ (b.double() * scale_b)).to(dtype)

    def calculate_scale_for_cast(
        self,
        x: Tensor,
        most: int,
        rounding: int,
        reduceAxis: int = 0,  # the bridge's own names, by which INC gives them
        reduceKeepdim: bool = False,
        fullscale: float = 1.0,
        backoff: float = 1.0,
    ) -> Tensor:
        if most:
            x = x.abs().max() if most == 1 else x.abs().amax(reduceAxis, keepdim=reduceKeepdim)
            x = x / (fullscale * backoff)
        return 2.0 ** x.log2().ceil() if rounding else x


@contextmanager
def gaudi(kind: INCAcceleratorType = GAUDI2) -> Iterator[Device]:
    """While it is open, INC and fadapt find a Gaudi of this kind whose tensors lie on the CPU."""
    device = Device(kind)
    factory = quantized_func_wrapper.QuantizedFuncWrapperFactory
    private = "_QuantizedFuncWrapperFactory__"
    wrappers = hpu_quantized_func_wrapper._OP_TYPE_HPU_QUANTIZED_WRAPPER_CLASSES
    linear = patching_common._mod_default_dict["Linear"]
    with torch.library._scoped_library("hpu", "DEF") as library, pytest.MonkeyPatch.context() as m:
        for schema in SCHEMAS:
            library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, getattr(device, name.partition(".")[0]), "CPU", with_keyset=False)
        m.setattr(factory, f"{private}device_func_wrappers_mapping", wrappers)
        m.setattr(factory, f"{private}is_initialized", True)
        m.setattr(factory, f"{private}quantized_func_wrapper_instances", {})
        m.setitem(PATCHED_MODULE_TABLE["cpu"], "Linear", linear)
        m.setattr(inc_fp8, "auto_detect_accelerator", lambda: device)
        yield device


def config(
    device: Device, state: str, method: str, hp: str, fmt: str, kind: str, load: bool = False
) -> Fp8cfg:
    """INC's own configuration of QDQ, which it parses on a CPU, in another state."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    asked = {
        "mode": "LOAD" if load else "QUANTIZE",
        "use_qdq": "True",
        "scale_method": "unit_scale",
    }
    try:
        made = Fp8cfg.parse(asked | {"fp8_config": kind, "hp_dtype": hp})
    finally:
        logging.disable(before)
    made.cfg.update(
        use_qdq=False,
        fake_quant=state == "fake",
        dynamic_quantization=state == "dynamic",
        use_stats_files=state != "dynamic",
        scale_format=ScaleFormat[fmt.upper()],
        device_type=device.kind,
        device_for_scales=device.kind,
        mod_dict={"Linear": "linear"},
    )
    name = scale_method_config.ScaleMethodString[method.upper()]
    default = scale_method_config.CfgStr.DEFAULT
    made.cfg["scale_method"][default] = scale_method_config.scale_method_config_mapping[name]
    made.cfg["scale_params"] |= {"hp_dtype": made.cfg["hp_dtype"]}
    made.cfg["scale_params"] |= {"lp_dtype": made.cfg["fp8_config"]}
    return made


@torch.no_grad()
def gaudi_layer(
    device: Device,
    state: str,
    method: str = "maxabs_arbitrary",
    hp: str = "bf16",
    fmt: str = "const",
    kind: str = "E4M3",
    n_in: int = 16,
    n_out: int = 8,
) -> PatchedLinear:
    """A ``PatchedLinear`` as ``convert`` leaves it in ``state``: ``fake``, ``fp8``, ``dynamic``.

    Calibrated as one whose inputs reached 1 in magnitude: a normal input is clipped (static).
    """
    mod = inc_layers.linear(n_in, n_out).to(inc_layers.DTYPES[hp])
    cfg = config(device, state, method, hp, fmt, kind)
    quantized_func_wrapper.QuantizedFuncWrapperFactory.clear()
    set_hqt_config(mod, cfg)
    method_of = cfg.cfg["scale_method"][scale_method_config.CfgStr.DEFAULT]
    backoff = 0.25 if "arbitrary" in method or "pow2" in method else 1.0
    reach = ModuleConfig(inputs=[[[backoff]]], outputs=[[[1.0]]])
    extra, _ = scale.load_layer_scales(
        mod, "l", cfg, "Linear", {"l": reach}, {}, None, None, {}, method_of,
        cfg.cfg["scale_params"], False, {},
    )  # fmt: skip
    if state != "fake":
        quantize.quantize_params(mod, extra)
    layer = PatchedLinear(mod, nn.Module(), extra)
    quantize.convert_fp16_to_bf16(layer)
    return layer


@torch.no_grad()
def loaded_layer(
    device: Device, layer: PatchedLinear, state: str, method: str, **settings: str
) -> PatchedLinear:
    """What INC makes of a saved layer: an empty one of its LOAD mode, and the saved tensors."""
    settings = {"hp": "bf16", "fmt": "const", "kind": "E4M3"} | settings
    model = nn.Sequential(inc_layers.linear(layer.weight.shape[0], layer.weight.shape[1]))
    cfg = config(device, state, method, load=True, **settings)
    quantized_func_wrapper.QuantizedFuncWrapperFactory.clear()
    set_hqt_config(model, cfg)
    quantize.quantize(model, ["0"])
    new = copy.copy(model[0])
    new.load_state_dict(layer.state_dict(), strict=False, assign=True)
    return new
