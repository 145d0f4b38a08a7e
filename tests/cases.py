"""The rows of the law table (test_laws.py, test_compile.py): bases and methods.

A new format adds a line to ``BASES``, a new method a line to ``METHODS``, and nothing else.
``FADAPT_TEST_DEVICE=cuda pytest tests/test_laws.py`` runs the table on another device.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import inc_layers
import int4_layers
import torch
from aqlm.inference_kernels.dequantization import dequantize_gemm
from aqlm_layers import quantized
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao_int8 import HAS_AFFINE, VERSION, affine, dynamic, weight_only

import fadapt as fa
from fadapt.bases.precision import CPU_GEMM_DTYPES

N_IN, N_HIDDEN, N_OUT, K = 16, 8, 8, 3
DEVICE = os.environ.get("FADAPT_TEST_DEVICE", "cpu")


class BaseRow(NamedTuple):
    """A layer in some format.

    Attributes:
        name: how the row is called in the test's id.
        layer: ``(n_in, n_out) -> layer`` with a bias; the same weights at every call.
        dtype: of the activations.
        rounds: the activation is rounded too, and derivatives pass straight through that.
        bound: of ``|forward(None) - module|``, as a share of the largest output; 0: same bytes.
        gradcheck: x may be float64, and the layer is smooth in it.
        compiled: test_compile.py runs it as well (seconds a row).
        vendor: ``(layer, x) -> y``, the vendor's forward; its formula where that does not run.
    """

    name: str
    layer: Callable[[int, int], nn.Module]
    dtype: torch.dtype
    rounds: bool = False
    bound: float = 0.0
    gradcheck: bool = False
    compiled: bool = False
    vendor: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)


class MethodRow(NamedTuple):
    """A method.

    Attributes:
        name: how the row is called in the test's id.
        method: its hyperparameters.
        compiled: test_compile.py runs it as well.
        detached: it holds a part of its forward constant to every derivative, as its paper does:
            finite differences are taken of what ``prepare`` returns, in which that part is fixed.
    """

    name: str
    method: fa.Method
    compiled: bool = False
    detached: bool = False


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def dense(n_in: int, n_out: int, dtype: torch.dtype = F32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(n_in, n_out).to(dtype)


def torchao(config: Callable[[], Any], dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    """Layers quantized by torchao's ``quantize_``."""

    def layer(n_in: int, n_out: int) -> nn.Module:
        one = dense(n_in, n_out, dtype)
        quantize_(one, config())
        return one

    return layer


def row() -> Any:
    return weight_only(PerRow())


def group() -> Any:
    return weight_only(PerGroup(4))


def tensor() -> Any:
    return weight_only(PerTensor())


def static() -> Any:
    """Its range is wide enough for nothing to be clipped."""
    scale = torch.full((1, 1), 8 / 127)
    return Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=PerTensor())


def two_axes(layer: nn.Module, x: Tensor) -> Tensor:
    """torchao's static product, which wants x of the scale's rank."""
    y: Tensor = layer(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], -1)


def inc(
    hp: str, method: str = "maxabs_arbitrary", kind: str = "E4M3"
) -> Callable[[int, int], nn.Module]:
    """INC's layers, calibrated wide enough for nothing to be clipped."""

    def layer(n_in: int, n_out: int) -> nn.Module:
        x = 4 * torch.ones(1, n_in)
        model = nn.Sequential(dense(n_in, n_out))
        return inc_layers.quantized(model, x, method, hp, kind=kind)[0]

    return layer


def aqlm(fmt: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    """Layers of ``aqlm.QuantizedLinear``: codebooks, bits, in group, out group."""
    return lambda n_in, n_out: quantized(fmt, n_in, n_out, dtype)


def aqlm_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """AQLM's own. On a GPU not by its layer, whose kernels there take no float32, and of inputs
    that are not a multiple of 64 give wrong numbers."""
    if DEVICE == "cpu":
        return layer(x)
    return dequantize_gemm(x, layer.codes, layer.codebooks, layer.scales, layer.bias)


def plain_int4(dtype: torch.dtype, **options: Any) -> BaseRow:
    """Its kernel is the package mslk's, for CUDA and bfloat16: the law is its format's formula."""
    name = {F32: "int4-plain-f32", BF16: "int4-plain-bf16"}[dtype]
    eps = torch.finfo(dtype).eps
    return BaseRow(
        name,
        lambda n_in, n_out: int4_layers.int4(dense(n_in, n_out, dtype)),
        dtype,
        bound=2 * eps,  # W's rounding, and the sum's and the bias's
        vendor=int4_layers.linear,
        **options,
    )


def int4() -> Any:
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(4))


def int2() -> Any:
    return IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerAxis(0))


def int4_dynamic() -> Any:
    kind = PerGroup(4)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=kind)


def older(kind: str, dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    """Layers of torchao's older class."""
    return lambda n_in, n_out: affine(dense(n_in, n_out, dtype), kind)


def lowered(dtype: torch.dtype) -> float:
    """The vendor multiplies in x's dtype; on a CPU that only emulates it we do so in float32, and
    round once instead of after the product and after the scale."""
    return 0.0 if dtype in CPU_GEMM_DTYPES else 2 * torch.finfo(dtype).eps


def by_group(dtype: torch.dtype) -> float:
    """torchao 0.16's int8 by group is the older class, which adds the bias before it rounds."""
    return lowered(dtype) if VERSION >= (0, 17) else 2 * torch.finfo(dtype).eps


BASES: tuple[BaseRow, ...] = (
    BaseRow("dense-f64", lambda i, o: dense(i, o, F64), F64, gradcheck=True),
    BaseRow("dense-f32", lambda i, o: dense(i, o, F32), F32, compiled=True),
    BaseRow("dense-bf16", lambda i, o: dense(i, o, BF16), BF16, bound=lowered(BF16)),
    BaseRow("dense-f16", lambda i, o: dense(i, o, F16), F16, bound=lowered(F16)),
    BaseRow("int8-row-f32", torchao(row, F32), F32, gradcheck=True, compiled=True),
    BaseRow("int8-row-bf16", torchao(row, BF16), BF16, bound=lowered(BF16)),
    BaseRow("int8-row-f16", torchao(row, F16), F16, bound=lowered(F16)),
    BaseRow("int8-group-f32", torchao(group, F32), F32, gradcheck=True, compiled=True),
    BaseRow("int8-group-bf16", torchao(group, BF16), BF16, bound=by_group(BF16)),
    BaseRow("int8-group-f16", torchao(group, F16), F16, bound=by_group(F16)),
    BaseRow("int8-tensor-f32", torchao(tensor, F32), F32, gradcheck=True),
    BaseRow("int8-static-f32", torchao(static, F32), F32, rounds=True, vendor=two_axes),
    BaseRow("int8-dynamic-f32", torchao(dynamic, F32), F32, rounds=True, compiled=True),
    BaseRow("int8-dynamic-bf16", torchao(dynamic, BF16), BF16, rounds=True),
    BaseRow("int8-dynamic-f16", torchao(dynamic, F16), F16, rounds=True),
    # AQLM scales W and rounds it to its dtype, fadapt the product; sums are in another order.
    BaseRow("float8-row-f32", torchao(Float8WeightOnlyConfig, F32), F32, compiled=True),
    BaseRow("float8-row-bf16", torchao(Float8WeightOnlyConfig, BF16), BF16, bound=lowered(BF16)),
    BaseRow("float8-row-f16", torchao(Float8WeightOnlyConfig, F16), F16, bound=lowered(F16)),
    BaseRow("int2-row-f32", torchao(int2, F32), F32, bound=1e-6, gradcheck=True),
    BaseRow("int4-group-f32", torchao(int4, F32), F32, bound=1e-6, gradcheck=True, compiled=True),
    BaseRow("int4-group-bf16", torchao(int4, BF16), BF16, bound=2 * 2**-7),
    BaseRow("int4-dynamic-bf16", torchao(int4_dynamic, BF16), BF16, rounds=True, bound=2 * 2**-7),
    plain_int4(F32, gradcheck=True, compiled=True),
    plain_int4(BF16),
    BaseRow("inc-f32", inc("fp32"), F32, rounds=True, compiled=True),
    BaseRow("inc-e5m2-bf16", inc("bf16", kind="E5M2"), BF16, rounds=True),
    BaseRow("inc-channel-bf16", inc("bf16", inc_layers.PCS), BF16, rounds=True),
    BaseRow(
        "aqlm-2x8-f32",
        aqlm((2, 8, 8, 1), F32),
        F32,
        bound=1e-6,
        gradcheck=True,
        vendor=aqlm_forward,
    ),
    BaseRow("aqlm-1x8-f32", aqlm((1, 8, 8, 1), F32), F32, bound=1e-6, vendor=aqlm_forward),
    BaseRow("aqlm-1x16-f16", aqlm((1, 16, 8, 1), F16), F16, bound=2 * 2**-10, vendor=aqlm_forward),
    BaseRow(
        "aqlm-3x4-f32", aqlm((3, 4, 4, 2), F32), F32, bound=1e-6, compiled=True, vendor=aqlm_forward
    ),
    BaseRow(
        "aqlm-1x16-bf16", aqlm((1, 16, 8, 1), BF16), BF16, bound=2 * 2**-7, vendor=aqlm_forward
    ),
)

if HAS_AFFINE:
    BASES += (
        BaseRow("affine-row-f32", older("row", F32), F32, gradcheck=True, compiled=True),
        BaseRow("affine-row-bf16", older("row", BF16), BF16, bound=lowered(BF16)),
        BaseRow("affine-group-bf16", older("group-zeros", BF16), BF16, bound=2 * 2**-7),
        BaseRow("affine-tensor-f32", older("tensor", F32), F32, gradcheck=True),
        BaseRow("affine-dynamic-f32", older("dynamic", F32), F32, rounds=True, compiled=True),
        BaseRow("affine-dynamic-bf16", older("dynamic", BF16), BF16, rounds=True),
        BaseRow("affine-dynamic-f16", older("dynamic", F16), F16, rounds=True),
        BaseRow("affine-zeros-f32", older("dynamic-zeros", F32), F32, rounds=True, bound=1e-6),
        BaseRow(
            "affine-int4-bf16", older("int4-dynamic", BF16), BF16, rounds=True, bound=2 * 2**-7
        ),
    )

METHODS = (
    MethodRow("lora", fa.LoRA(rank=2, alpha=6), compiled=True),
    MethodRow("lora-rs-bias", fa.LoRA(rank=3, alpha=2, rslora=True, lora_bias=True)),
    MethodRow("dora", fa.DoRA(rank=2, alpha=6), detached=True),
    MethodRow("oft", fa.OFT(block_size=4)),
    MethodRow("oft-neumann", fa.OFT(block_size=4, cayley="neumann", terms=7)),
)


class Plain:
    """A base as plain torch over the dequantized weight: what every transform is held against.

    For a smooth base all of it in float64. For one that rounds its activations the value is the
    base's own, in its own dtype (law 2 holds that to the vendor's), and the derivative that of W x.
    """

    def __init__(self, base: fa.Base, rounds: bool):
        self.base, self.rounds = base, rounds
        self.in_features, self.out_features = base.in_features, base.out_features
        self.device, self.dtype = base.device, base.dtype if rounds else F64
        # W as it is multiplied: rounded to the format's own dtype where that is part of it.
        self.weight = base.dequantize().double()
        bias: Tensor | None = getattr(base, "bias", None)
        self.bias = torch.zeros(()) if bias is None else bias.double()

    def linear(self, x: Tensor) -> Tensor:
        exact = x.double() @ self.weight.mT + self.bias
        if not self.rounds:
            return exact
        exact = exact.to(x.dtype)
        return exact + (self.base.linear(x.detach()) - exact).detach()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(dtype or self.dtype)

    def rows(self, rows: slice) -> "Plain":
        return Plain(self.base.rows(rows), self.rounds)


class Case(NamedTuple):
    """One base and one method: a model of two such layers, its forward, and what to feed it."""

    row: BaseRow
    method: fa.Method
    model: nn.Module
    forward: fa.Forward
    reference: Callable[..., Tensor]  # by Plain; plain reverse-mode autograd only
    params: Any  # one adapter
    many: Any  # K of them
    x: Tensor  # [3, N_IN]
    xs: Tensor  # [K, 3, N_IN]
    tangents: tuple[Any, Tensor]  # of params and x


def randomized(params: Any, seed: int) -> Any:
    """Every leaf moved off its initial value, so that nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: t + 0.2 * torch.randn(t.shape, generator=g).to(t), params)


@cache
def make(row: BaseRow, method: MethodRow) -> Case:
    model = nn.Sequential(row.layer(N_IN, N_HIDDEN), nn.Tanh(), row.layer(N_HIDDEN, N_OUT))
    model = model.eval().to(DEVICE)
    forward, twin = fa.bind(model, method.method), fa.bind(model, method.method)
    for layer in twin.layers.values():
        layer.base = Plain(layer.base, row.rounds)

    def reference(params: Any, x: Tensor) -> Tensor:
        if row.rounds:
            return twin(params, x)
        return twin(tree_map(lambda t: t.double(), params), x.double())

    g = torch.Generator().manual_seed(0)
    fresh = fa.init(method.method, model, generator=g)
    adapters = [randomized(fresh, seed) for seed in range(K)]
    xs = torch.randn(K, 3, N_IN, generator=g).to(DEVICE, row.dtype)
    params, x = adapters[0], xs[0]
    moves = tree_map(lambda t: torch.randn(t.shape, generator=g).to(t), (params, x))
    many = fa.stack(adapters)
    return Case(row, method.method, model, forward, reference, params, many, x, xs, moves)


def eps_of(row: BaseRow) -> float:
    return torch.finfo(row.dtype).eps
