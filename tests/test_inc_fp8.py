"""INC's FP8 layers: the layer's own numbers bit for bit, and gradients that do not vanish."""

import copy
import warnings

import pytest
import torch
from cases import randomized
from inc_layers import DTYPES, PCS, inc_layer, linear, normal, quantized
from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import (
    PatchedLinear,
    PatchedUnmeasuredModule,
)
from neural_compressor.torch.quantization import load, save
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM

import fadapt as fa
from fadapt.bases.inc_fp8 import IncFp8
from fadapt.testing import assert_pure


@pytest.mark.parametrize("kind", ["E4M3", "E5M2"])
@pytest.mark.parametrize("hp", DTYPES)
@pytest.mark.parametrize("method", ["maxabs_arbitrary", "maxabs_pow2", "unit_scale", PCS])
def test_linear_is_the_layers_own_forward_bit_for_bit(method, hp, kind):
    layer = inc_layer(16, 8, method=method, hp=hp, kind=kind)
    base = fa.base_of(layer)
    assert isinstance(base, IncFp8)
    assert base.weight.data_ptr() == layer.weight.data_ptr()
    assert not base.weight.requires_grad
    for size in (1e-3, 1.0, 10.0, 1e3):  # from below the smallest step to far beyond the range
        x = normal(5, 16, seed=1, dtype=DTYPES[hp]) * size
        got = assert_pure(lambda x=x: base.linear(x), layer, x)
        with torch.no_grad():
            want = layer(x)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(base.dequantize(), layer.dequant_weights(layer.weight).mT)
    again = base.requantize(base.dequantize())
    assert torch.equal(again.weight.view(torch.int8), base.weight.view(torch.int8))
    assert torch.equal(again.scale, base.scale)


@pytest.mark.parametrize("fmt", ["const", "scalar"])
def test_scales_as_tensors_and_as_numbers(fmt):
    layer, x = inc_layer(16, 8, fmt=fmt), normal(3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fa.base_of(layer).linear(x), layer(x))


@pytest.mark.parametrize("scale", [10.0**k for k in range(-6, 4)])
@pytest.mark.parametrize("method", ["maxabs_arbitrary", PCS])
def test_the_gradient_is_straight_through_at_every_scale(method, scale):
    layer = inc_layer(16, 8, method=method, hp="fp32")
    base, x, g = fa.base_of(layer), 4 * normal(6, 16), normal(6, 8, seed=4) * scale
    inside = (x.double() / base.act_scale.double()).abs() <= base.layer.limit
    assert not inside.all()
    assert inside.any()
    want = (g.double() @ base.dequantize().double()) * inside
    got = grad(lambda x: (base.linear(x) * g).sum())(x)
    # 8 products of float32, summed.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * scale)
    twice = grad(lambda x: (base.linear(x) * g * 2.0**-40).sum())(x) * 2.0**40
    assert torch.equal(twice, got)  # linear in the upstream gradient: no scale is lost
    jacobian = jacrev(base.linear)(x[0])
    torch.testing.assert_close(jacobian, base.dequantize() * inside[0], rtol=0, atol=0)
    _, tangent = jvp(base.linear, (x,), (x,))
    torch.testing.assert_close(tangent, (x * inside) @ base.dequantize().mT, rtol=1e-5, atol=1e-6)
    many = vmap(grad(lambda x, g: (base.linear(x) * g).sum()))(x, g)
    torch.testing.assert_close(many, got, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("kind", ["E4M3", "E5M2"])
@pytest.mark.parametrize("hp", DTYPES)
def test_the_gradient_in_every_format_is_exact_to_the_dtypes_own_rounding(hp, kind):
    base, dtype = fa.base_of(inc_layer(16, 8, hp=hp, kind=kind)), DTYPES[hp]
    x = 4 * normal(6, 16, dtype=dtype)
    inside = (x.double() / base.act_scale.double()).abs() <= base.layer.limit
    assert not inside.all()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for scale in (10.0**k for k in range(-6, 4)):
        g = (normal(6, 8, seed=4) * scale).to(dtype)
        want = (g.double() @ base.dequantize().double()) * inside
        got = grad(lambda x, g=g: (base.linear(x) * g).double().sum())(x)
        # A sum of 8 products in float32, rounded once to a number of the dtype (or a subnormal).
        bound = eps / 2 * want.abs() + tiny / 2 + 8 * 2.0**-23 * float(want.abs().max())
        assert ((got.double() - want).abs() <= bound).all(), scale
        assert got[inside].count_nonzero() > 0.9 * inside.sum()


def test_an_earlier_layers_gradient_keeps_its_norm():
    """Two layers: INC's own backward casts to float8, so the first layer's gradient over the
    upstream scale changes with it. Ours is the same number at every power of two."""
    model = quantized(nn.Sequential(linear(16, 16), linear(16, 8)), normal(16, 16), hp="fp32")
    method = fa.LoRA(rank=2)
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params, forward, x = randomized(fresh, 0), fa.bind(model, method), normal(4, 16, seed=2)
    _, want = fa.value_and_grad(lambda p: forward(p, x).sum())(params)
    for power in (-20, -7, 10):
        _, got = fa.value_and_grad(lambda p, s=2.0**power: (forward(p, x) * s).sum())(params)
        torch.testing.assert_close(
            tree_map(lambda t, s=2.0**power: t / s, got), want, rtol=0, atol=0
        )


@pytest.mark.parametrize("hp", ["fp32", "bf16"])
def test_lora_is_pefts(hp):
    model = nn.Sequential()
    model.add_module("up", linear(16, 8))
    model = quantized(model, normal(16, 16), hp=hp)
    method = fa.LoRA(rank=2, alpha=6, targets=["up"])
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params, x = randomized(fresh, 0), normal(5, 16, seed=2, dtype=DTYPES[hp])
    forward = fa.bind(model, method)
    got = forward(params, x)
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, lora_alpha=6, target_modules=["up"])
    )
    theirs = wrapped.base_model.model.up
    assert type(theirs).__name__ == "IncLoraLinear"
    theirs.lora_A["default"].weight.data = params["up"].lora_A
    theirs.lora_B["default"].weight.data = params["up"].lora_B
    with torch.no_grad():
        want = wrapped.eval()(x)
    # The same operations in both: what differs is where the sum of 2 products is rounded.
    eps = torch.finfo(DTYPES[hp]).eps
    torch.testing.assert_close(got, want.to(got.dtype), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("method", ["maxabs_arbitrary", PCS])
def test_what_inc_saves_and_loads_is_read_the_same(tmp_path, method):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    quantized(model, ids, method=method)
    lora = fa.LoRA(rank=2, targets=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # INC's own, of files and of torch.load
        save(model, str(tmp_path), format="huggingface")
        back = load(str(tmp_path), format="huggingface", device="cpu").eval()
    read = fa.base_of(back.model.layers[0].mlp.down_proj)
    assert isinstance(read, IncFp8)
    first = fa.base_of(model.model.layers[0].mlp.down_proj)
    assert torch.equal(read.dequantize(), first.dequantize())
    for one in (model, back):  # INC keeps a scale that was a number in bfloat16
        with torch.no_grad():
            want = one(ids).logits
        assert torch.equal(fa.bind(one, lora)(None, ids).logits, want)


def test_layers_that_are_not_converted_say_what_to_do():
    measuring = quantized(nn.Sequential(linear(16, 8)), normal(4, 16), finish=False)
    with pytest.raises(fa.errors.UnsupportedLayerError, match=r"measure mode.*convert\(model\)"):
        fa.base_of(measuring[0])
    unmeasured = PatchedUnmeasuredModule("lm_head", nn.Linear(2, 2))
    with pytest.raises(fa.errors.UnsupportedLayerError, match="'lm_head' was never measured"):
        fa.base_of(unmeasured)


@pytest.mark.parametrize("method", ["maxabs_arbitrary", PCS])
@pytest.mark.parametrize("kind", [fa.LoRA(rank=2, alpha=4), fa.OFT(block_size=4), fa.DoRA(rank=2)])
def test_the_merged_layer_is_run_by_inc(kind, method):
    model = quantized(nn.Sequential(linear(16, 8)), normal(16, 16), method=method, hp="fp32")
    fresh = fa.init(kind, model, generator=torch.Generator().manual_seed(0))
    params, x = randomized(fresh, 0), normal(5, 16, seed=2)
    old = fa.base_of(model[0])
    merged = assert_pure(lambda: fa.merged_model(model, params, kind), model, params)
    assert isinstance(merged[0], PatchedLinear)
    new = fa.base_of(merged[0])
    exact = kind.merge(old.dequantize(), params["0"])
    # Half a step of float8 with 3 bits of mantissa, or of its smallest numbers (2**-9).
    bound = torch.maximum(exact.abs() * 2.0**-4, new.scale * 2.0**-10) * (1 + 1e-5)
    assert ((new.dequantize() - exact).abs() <= bound).all()
    with torch.no_grad():
        assert torch.equal(merged[0](x), fa.bind(merged, fa.LoRA())(None, x))
    state, undo = fa.merge(model, params, kind, undo=True, scales="keep")
    with torch.no_grad():
        kept = functional_call(model, state, (x,))
    assert not torch.equal(kept, model(x))
    back = fa.unmerge(fa.merged_model(model, params, kind, scales="keep"), params, kind, undo=undo)
    assert torch.equal(back["0.weight"].view(torch.int8), model[0].weight.view(torch.int8))


def test_float32_and_float16_biases_promote_as_inc_does():
    layer, x = inc_layer(16, 8, hp="bf16"), normal(3, 16, dtype=torch.bfloat16)
    layer.bias = nn.Parameter(layer.bias.float())
    with torch.no_grad():
        want = layer(x)
    got = fa.base_of(layer).linear(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
