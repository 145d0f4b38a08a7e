"""Merging from one format into another, named by ``to=``: every base into every target.

The result is the vendor's own layer, whose forward the vendor runs; W is dequantized once and
rounded once.
"""

import inc_layers
import pytest
import torch
from aqlm import QuantizedLinear
from cases import BASES, randomized
from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import PatchedLinear
from neural_compressor.torch.quantization import load
from small_lm import make_model
from torch import nn
from torch.utils._pytree import tree_map
from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
from torchao_int8 import VERSION

import fadapt as fa
from fadapt.errors import AdapterError, ConfigError, MergeError, UnsupportedLayerError
from fadapt.inc_files import save_inc_model
from fadapt.quieting import quiet
from fadapt.testing import assert_pure

F32 = torch.finfo(torch.float32).eps
# Target -> the class of its layer, of its weight.
TARGETS = {
    "dense": (nn.Linear, nn.Parameter),
    "float32": (nn.Linear, nn.Parameter),
    "bfloat16": (nn.Linear, nn.Parameter),
    "int8": (nn.Linear, Int8Tensor),
    "int8-tensor": (nn.Linear, Int8Tensor),
    "int8-group4": (nn.Linear, Int8Tensor),
    "int8-dynamic": (nn.Linear, Int8Tensor),
    "int3": (nn.Linear, IntxUnpackedToInt8Tensor),
    "int4-group4": (nn.Linear, IntxUnpackedToInt8Tensor),
    "float8": (nn.Linear, Float8Tensor),
    "inc-fp8": (PatchedLinear, nn.Parameter),
}
SOURCES = ("dense-f32", "dense-bf16", "int8-group-f32", "float8-row-bf16", "int4-group-f32")
SOURCES = (
    *SOURCES,
    "int4-plain-bf16",
    "inc-f32",
    "inc-channel-bf16",
    "aqlm-2x8-f32",
    "aqlm-3x4-f32",
)
METHODS = (fa.LoRA(rank=2, alpha=3, lora_bias=True), fa.DoRA(rank=2), fa.OFT(block_size=4))
METHOD = METHODS[0]
sources = pytest.mark.parametrize(
    "row", [r for r in BASES if r.name in SOURCES], ids=lambda r: r[0]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(row) -> nn.Module:
    return nn.Sequential(row.layer(16, 8), nn.Tanh(), row.layer(8, 8)).eval()


def half_step(base, weight: torch.Tensor) -> torch.Tensor:
    """Half the distance of the format's numbers around each element of ``weight``."""
    if isinstance(base, fa.Dense):
        return weight.abs().clamp(min=1e-30) * torch.finfo(base.dtype).eps / 2
    scale = base.scale.double()
    if base.codes().dtype.is_floating_point:  # 3 bits of mantissa; the smallest are 2**-9 apart
        return torch.maximum(weight.abs() * 2.0**-4, scale * 2.0**-10)
    return (scale / 2).repeat_interleave(weight.shape[1] // scale.shape[1], 1).expand_as(weight)


@sources
@pytest.mark.parametrize("to", TARGETS)
def test_into_each_format_rounded_once_and_run_by_its_vendor(row, to):
    model, g = model_of(row), seeded()
    x = torch.randn(32, 16, generator=g).to(row.dtype)
    if to == "int8-group4" and VERSION < (0, 17):
        params = fa.init(METHOD, model, generator=g)
        with pytest.raises(ConfigError, match="multiplies by no Int8Tensor"):
            fa.merged_model(model, params, METHOD, to=to)
        return
    for method in METHODS:
        params = randomized(fa.init(method, model, generator=g), 1)
        amax = fa.input_amax(model, params, method, [x])
        merged = assert_pure(
            lambda m=method, p=params, a=amax: fa.merged_model(model, p, m, to=to, amax=a),
            model,
            params,
        )
        layer, holds = TARGETS[to]
        for path in params:
            old, new = (fa.base_of(m.get_submodule(path)) for m in (model, merged))
            assert type(merged.get_submodule(path)) is layer
            assert type(merged.get_submodule(path).weight) is holds
            # W + ΔW of the weight as it is dequantized, and nothing rounded on the way: in float64.
            want = method.merge(
                old.dequantize(torch.float32).double(),
                tree_map(lambda t: t.double(), prepared(method, params, path, old)),
            )
            error = (new.dequantize(torch.float32).double() - want).abs()
            # Summed in float32. A symmetric scale of torchao's is amax / (half the range), so that
            # amax itself may be half a step beyond; bfloat16's scales are rounded to it: its eps
            # of up to 4 steps.
            slack = 64 * F32 * want.abs().amax()
            steps = half_step(new, want)
            bound = steps * (1 + 1e-5) + slack
            if to.startswith("int8"):  # up to torchao 0.17 its scales are of the weight's dtype:
                # 127.5 steps of one rounded down fall short by as many times half an eps.
                bound = bound + 127.5 * torch.finfo(new.scale.dtype).eps * steps
            if to.startswith("int3") or to.startswith("int4"):
                bound = 2 * bound + steps * (0.05 if row.dtype == torch.bfloat16 else 0)
            assert bool((error <= bound).all()), (method, float((error / bound).max()))
        x0, new = x.to(fa.base_of(merged[0]).dtype), fa.base_of(merged[0])
        with torch.no_grad():
            y, ours = merged[0](x0), new.linear(x0)  # the vendor's forward, and ours
        # The bounds of the law table's law 2: the same sums in another order, in the dtype of x.
        eps = torch.finfo(new.dtype).eps
        torch.testing.assert_close(y, ours, rtol=16 * eps, atol=16 * eps)


def prepared(method, params, path, base):
    return method.prepare({path: params[path]}, {path: base})[path]


@pytest.mark.parametrize("hp", ["fp32", "bf16"])
def test_inc_rounds_the_inputs_as_its_own_calibration_does(hp):
    x = 3.7 * torch.randn(64, 16, generator=seeded()).to(inc_layers.DTYPES[hp])
    model = nn.Sequential(inc_layers.linear(16, 8)).to(x.dtype)
    params = fa.init(METHOD, model, generator=seeded())  # changes nothing
    amax = fa.input_amax(model, params, METHOD, x.split(16))
    with pytest.raises(AdapterError, match=r"layer '.*' hold NaN or Inf"):
        fa.input_amax(model, params, METHOD, [x, x * float("nan")])
    assert amax == {"0": float(x.abs().max())}
    new = fa.base_of(fa.merged_model(model, params, METHOD, to="inc-fp8", amax=amax)[0])
    theirs = inc_layers.quantized(nn.Sequential(inc_layers.linear(16, 8)), x, inc_layers.PCS, hp)
    own = fa.base_of(theirs[0])
    assert torch.equal(new.act_scale, own.act_scale)
    assert (new.scale.dtype, new.layer.limit) == (own.scale.dtype, own.layer.limit)


@sources
@pytest.mark.parametrize("to", ["aqlm-2x6", "aqlm-1x8-group4"])
def test_into_aqlm(row, to):
    model, g = model_of(row), seeded()
    params = randomized(fa.init(METHOD, model, generator=g), 1)
    x = torch.randn(64, 16, generator=g).to(row.dtype)
    run = lambda: fa.merged_model(model, params, METHOD, to=to, generator=seeded(3))  # noqa: E731
    merged = assert_pure(run, model, params)
    again = run()
    for path in params:
        layer, base = merged.get_submodule(path), fa.base_of(model.get_submodule(path))
        assert type(layer) is QuantizedLinear
        assert (layer.in_group_size, layer.num_codebooks) == ((8, 2) if "2x6" in to else (4, 1))
        assert all(map(torch.equal, layer.parameters(), again.get_submodule(path).parameters()))
        want = METHOD.merge(base.dequantize(torch.float32), params[path])
        # As many vectors as groups or more: each group's own, up to the codebooks' dtype (and the
        # scale's, and that of the product).
        error = (fa.base_of(layer).dequantize(torch.float32) - want).abs().max()
        assert error <= 4 * torch.finfo(layer.codebooks.dtype).eps * want.abs().max() + 16 * F32
    new = fa.base_of(merged[0])
    if new.dtype == torch.float32 or "2x6" in to:  # AQLM's CPU kernel of 256 entries: float32 alone
        with torch.no_grad():
            y, ours = merged[0](x.to(new.dtype)), new.linear(x.to(new.dtype))
        eps = torch.finfo(new.dtype).eps  # law 2's bound, of 16 products
        torch.testing.assert_close(y, ours, rtol=16 * eps, atol=16 * eps)


def test_aqlm_from_the_weight_that_was_quantized_and_by_the_inputs():
    g = seeded()
    weight, x = torch.randn(32, 32, generator=g), torch.randn(128, 4, generator=g)
    x = x @ torch.randn(4, 32, generator=g) + 0.1 * torch.randn(128, 32, generator=g)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight.data = weight.clone()
    method = fa.LoRA(rank=2)
    params = randomized(fa.init(method, model, generator=g), 1)
    want = fa.bind(model, method)(params, x)
    moments, errors = fa.calibrate(model, params, method, [x]), {}
    for name, options in {"W": {}, "outputs": {"moments": moments}}.items():
        merged = fa.merged_model(
            model, params, method, to="aqlm-2x4", generator=seeded(), **options
        )
        with torch.no_grad():
            errors[name] = float((merged(x) - want).norm() / want.norm())
    assert errors["outputs"] < 0.7 * errors["W"]  # measured 0.4
    rough = fa.merged_model(model, fa.init(method, model, generator=g), method, to="int2")
    original = fa.Recode(original={"0": weight})
    full = {"W": fa.Recode(), "original": original}
    for name, how in full.items():
        merged = fa.merged_model(rough, params, method, to="aqlm-2x6", generator=seeded(), aqlm=how)
        with torch.no_grad():
            errors[name] = float((merged(x) - want).norm() / want.norm())
    assert errors["original"] < 0.5 * errors["W"]  # int2's own error is not in it


def test_what_cannot_be_merged_into_says_what_to_do():
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64))
    params = fa.init(METHOD, model, generator=seeded())
    cases = [
        ("inc-fp8", {}, AdapterError, r"'0' rounds its inputs .*input_amax"),
        ("inc-fp8", {"amax": {"0": 0.0}}, AdapterError, r"positive number; got 0\.0"),
        ("inc-fp8", {"amax": {"0": 1.0}}, ConfigError, r"fp32, bf16, fp16, not torch\.float64"),
        ("aqlm-2x8", {}, ConfigError, "draws .* generator="),
        ("aqlm-2x17", {"generator": seeded()}, ConfigError, "1 to 16 bits"),
        ("aqlm-2x8-group3", {"generator": seeded()}, ConfigError, "groups of 3 do not divide"),
        ("aqlm-2x8", {"rounding": "search"}, ConfigError, "codes are searched for, not rounded"),
        ("int4-group5", {}, ConfigError, "groups of 5 do not divide"),
        ("int9", {}, ConfigError, r"no such format.*inc-fp8"),
    ]
    for to, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            fa.merged_model(model, params, METHOD, to=to, **options)
    model = model.float()
    params = fa.init(METHOD, model, generator=seeded())
    for to, options in (("inc-fp8", {"amax": {"0": 1.0}}), ("aqlm-2x4", {"generator": seeded()})):
        with pytest.raises(MergeError, match="merged_model puts"):
            fa.merge(model, params, METHOD, to=to, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_incs_own_load_brings_the_merged_layers_back(tmp_path, dtype):
    with quiet():
        from transformers import AutoModelForCausalLM

        folder = make_model(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    method = fa.LoRA(rank=2, targets=["q_proj", "down_proj"])
    params = randomized(fa.init(method, model, generator=seeded()), 0)
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    amax = fa.input_amax(model, params, method, [ids])
    merged = fa.merged_model(model, params, method, to="inc-fp8", amax=amax)
    assert_pure(lambda: save_inc_model(merged, tmp_path / "out"), merged, model)
    assert not hasattr(merged.config, "quantization_config")
    with quiet():
        back = load(str(tmp_path / "out"), format="huggingface", device="cpu").eval()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        ours, theirs = merged.get_submodule(path), back.get_submodule(path)
        assert type(theirs) is (PatchedLinear if path in params else nn.Linear)
        x = torch.randn(3, module.in_features, generator=seeded()).to(dtype)
        with torch.no_grad():
            assert torch.equal(theirs(x), ours(x))
    if dtype == torch.float32:  # INC's load puts the rotary frequencies in bfloat16 with the rest
        with torch.no_grad():
            assert torch.equal(back(**ids).logits, merged(**ids).logits)
    with pytest.raises(UnsupportedLayerError, match="no FP8 layer"):
        save_inc_model(model, tmp_path / "none")
