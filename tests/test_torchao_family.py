"""torchao's other weights, float8 and 1 to 8 bits: its numbers, and its layers after a merge."""

import pytest
import torch
from cases import dense, randomized
from torch import nn
from torch.func import grad
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao_int8 import AFFINE_INTX, HAS_AFFINE, affine, inner, integers

import fadapt as fa
from fadapt.bases.float8 import Float8
from fadapt.bases.intx import Intx
from fadapt.bases.torchao import check_version
from fadapt.testing import assert_pure

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def intx(bits, group=8, mapping=MappingType.SYMMETRIC):
    granularity = PerGroup(group) if group else PerAxis(0)
    kind = getattr(torch, f"int{bits}")
    return IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity, mapping_type=mapping)


CONFIGS = {
    "float8": Float8WeightOnlyConfig(),
    **{f"int{bits}": intx(bits) for bits in range(2, 9)},
    "int4-row": intx(4, group=0),
    "int4-asymmetric": intx(4, mapping=MappingType.ASYMMETRIC),
    "int4-dynamic": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(8)
    ),
}
if HAS_AFFINE:  # up to 0.17: the older class where its activations have a zero point
    CONFIGS |= {f"affine-{kind}": kind for kind in AFFINE_INTX}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def quantized(config, dtype=F32, n_in=32, n_out=16):
    layer = dense(n_in, n_out, dtype).requires_grad_(False)
    if isinstance(config, str):
        return affine(layer, config)
    quantize_(layer, config)
    return layer


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@configs
def test_linear_and_dequantize_are_torchaos(config, dtype):
    layer = quantized(config, dtype)
    base = fa.base_of(layer)
    assert type(base) is (Float8 if isinstance(layer.weight, Float8Tensor) else Intx)
    assert base.qdata.data_ptr() == integers(layer.weight).data_ptr()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = assert_pure(lambda: base.linear(x), layer, x)
    # torchao adds the bias before y is rounded to a low dtype, and here it is added after.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, layer(x), rtol=eps, atol=0 if dtype == F32 else 2 * eps)
    assert torch.equal(base.dequantize(), inner(layer.weight).dequantize())
    fresh = nn.Linear(32, 16, device="meta")
    assert str(base.state()["weight"]) == str(layer.weight.data)  # all that torchao tells of it
    out = torch.func.functional_call(fresh, base.state(), (x,))  # torchao runs what is given back
    assert torch.equal(out, layer(x))


@configs
def test_an_unchanged_weight_gives_back_its_bytes(config):
    base = fa.base_of(quantized(config))
    again = base.requantize(base.dequantize())
    assert torch.equal(again.codes().view(torch.int8), base.codes().view(torch.int8))
    assert torch.equal(again.scale, base.scale)
    wide = base.requantize(3 * base.dequantize())
    amax = wide.dequantize().abs().max()
    assert amax > 2.5 * base.dequantize().abs().max()


@configs
def test_a_merge_and_its_inverse_settle(config):
    """Each may widen a block's range, once: the next finds the grid that it made."""
    model, method = nn.Sequential(quantized(config)), fa.LoRA(rank=2, alpha=4)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params, old = randomized(params, 0), fa.base_of(model[0]).dequantize(F32)
    errors = []
    for _ in range(12):
        model = fa.merged_model(model, params, method)
        model[0].weight = nn.Parameter(fa.unmerge(model, params, method)["0.weight"], False)
        errors.append(float((fa.base_of(model[0]).dequantize(F32) - old).norm()))
    assert errors[-1] <= 1.5 * errors[0]


@pytest.mark.parametrize(
    "method", [fa.LoRA(rank=2, alpha=4), fa.DoRA(rank=2)], ids=["lora", "dora"]
)
@configs
def test_merged_within_half_a_step_and_run_by_torchao(config, method):
    model = nn.Sequential(quantized(config))
    g = torch.Generator().manual_seed(0)
    params = randomized(fa.init(method, model, generator=g), 0)
    merged = assert_pure(lambda: fa.merged_model(model, params, method), model, params)
    assert type(merged[0].weight) is type(model[0].weight)
    old, new = fa.base_of(model[0]), fa.base_of(merged[0])
    exact = method.merge(old.dequantize(), params["0"])
    if isinstance(new, Float8):  # three bits of mantissa; the smallest numbers are 2**-9 apart
        half = torch.maximum(exact.abs() * 2.0**-4, new.scale * 2.0**-10)
    else:
        half = new.scale.repeat_interleave(32 // new.scale.shape[1], 1) / 2
        # An end of the range, -half or half - 1 steps, may be half a step short of amax.
        half = half * (1 if new.zero_point is None else 2) + half * (new.zero_point is None)
    assert ((new.dequantize() - exact).abs() <= half * (1 + 1e-4) + 1e-6).all()
    x = torch.randn(5, 32, generator=g)
    torch.testing.assert_close(merged[0](x), new.linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", [PerRow(), PerTensor()], ids=["row", "tensor"])
def test_dynamic_float8_on_a_cpu_where_torchaos_own_asserts(granularity):
    """Its state as torchao makes it; its numbers by torchao's own rounding of the activation."""
    weight = dense(32, 16).weight.detach()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=g)
    kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity)
    layer = nn.Linear(32, 16, bias=False)
    layer.weight = nn.Parameter(
        Float8Tensor.from_hp(weight, granularity=granularity, act_quant_kwargs=kwargs),
        requires_grad=False,
    )
    base = fa.base_of(layer)
    rounded = Float8Tensor.from_hp(x, granularity=granularity).dequantize()
    want = rounded.double() @ layer.weight.dequantize().double().mT
    torch.testing.assert_close(base.linear(x).double(), want, rtol=1e-5, atol=1e-6)  # 32 products
    got = grad(lambda x: base.linear(x).square().sum())(x)
    by_hand = 2 * base.linear(x) @ base.dequantize()
    torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-5)
    assert base.linear(torch.zeros(2, 32)).eq(0).all()
    back = base.state()["weight"]
    assert back.act_quant_kwargs == kwargs
    assert torch.equal(back.dequantize(), layer.weight.dequantize())


def test_a_dense_layer_merges_into_float8():
    model, method = nn.Sequential(dense(32, 16)), fa.LoRA(rank=2)
    params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 0)
    merged = fa.merged_model(model, params, method, to="float8")
    want = nn.Linear(32, 16)
    want.weight.data = method.merge(model[0].weight.detach(), params["0"])
    quantize_(want, Float8WeightOnlyConfig())
    assert torch.equal(merged[0].weight.qdata.float(), want.weight.qdata.float())
    assert torch.equal(merged[0].weight.scale, want.weight.scale)


def test_an_older_torchao_is_refused():
    with pytest.raises(fa.errors.UnsupportedLayerError, match=r"torchao 0\.15\.0 .*'torchao>=0.16"):
        check_version("0.15.0")
    assert check_version("0.16.0+git") == (0, 16)
    assert check_version("0.18.1") == (0, 18)
