"""INC's Gaudi states, read from layers that INC's classes built: FP8 GEMM, fake-quant, dynamic.

What these tests hold fadapt to is INC's own forward over the ops of :mod:`inc_gaudi`.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from cases import randomized
from inc_gaudi import GAUDI2, GAUDI3, Device, gaudi, gaudi_layer, loaded_layer
from inc_layers import DTYPES, normal
from neural_compressor.torch.algorithms.fp8_quant._core import common
from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import PatchedLinear
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map

import fadapt as fa
from fadapt.bases import fp8, inc_fp8
from fadapt.bases.inc_fp8 import IncFp8
from fadapt.testing import assert_pure

PCS = "act_maxabs_hw_weights_pcs_maxabs_pow2"
STATIC = ("maxabs_arbitrary", "maxabs_pow2", "maxabs_hw", "unit_scale", PCS)
DYNAMIC = (
    "maxabs_arbitrary",
    "maxabs_pow2",
    "maxabs_pcs_pow2",
    "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw",
)
STATES = [("fake", m) for m in STATIC] + [("fp8", m) for m in STATIC]
STATES += [("dynamic", m) for m in DYNAMIC]
SHORT = [("fake", PCS), ("fp8", "maxabs_arbitrary"), ("fp8", PCS), ("dynamic", DYNAMIC[0])]
SHORT += [("dynamic", DYNAMIC[2])]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with gaudi(GAUDI2) as one:
        yield one


@pytest.fixture(params=[True, False], ids=["gemm", "plain"])
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """fadapt finds the device's GEMM, or does not: a Gaudi's layer, brought to another device."""
    if not request.param:
        monkeypatch.setattr(fp8, "gaudi", lambda device: False)


def inputs(hp: str, seed: int = 1) -> Tensor:
    """Some beyond the range of a layer that was calibrated on inputs up to 1. The ops of a Gaudi
    take no float16, and INC's models have none left."""
    return 2 * normal(2, 3, 16, seed=seed, dtype=DTYPES["bf16" if hp == "fp16" else hp])


def close(got: Tensor, want: Tensor) -> None:
    """The same products, summed in float32 by us and in float64 by the ops, then both rounded."""
    assert got.dtype == want.dtype
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=eps, atol=16 * 2.0**-23 * float(want.abs().max()))


def is_incs_own(device: Device, hp: str, layer: PatchedLinear) -> None:
    base = fa.base_of(layer)
    assert isinstance(base, IncFp8)
    assert base.layer.limit == device.limit(base.layer.kind)
    fake = base.layer.mode == "fake"
    assert fake or base.weight.data_ptr() == layer.weight.data_ptr()
    for size in (1e-3, 1.0, 1e3):  # from below the smallest step to far beyond the range
        x = inputs(hp) * size
        with torch.no_grad():
            want = layer(x)
        got = assert_pure(lambda x=x: base.linear(x), layer, x)
        assert want.count_nonzero()
        if fake:  # a product in the same dtype, of the same numbers
            assert torch.equal(got, want)
        else:
            close(got, want)


@pytest.mark.parametrize("kind", ["E4M3", "E5M2"])
@pytest.mark.parametrize(("state", "method"), STATES)
def test_linear_is_incs_own_forward(device, gemm, state, method, kind):
    for hp in DTYPES:
        if (state, hp) != ("fake", "fp16"):  # the op behind INC's own gives no float16: it fails
            is_incs_own(device, hp, gaudi_layer(device, state, method, hp, kind=kind))


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_a_gaudi_3_keeps_all_of_e4m3(device, monkeypatch, state, method):
    monkeypatch.setattr(device, "kind", GAUDI3)
    layer = gaudi_layer(device, state, method)
    assert fa.base_of(layer).layer.limit == 448
    is_incs_own(device, "bf16", layer)


@pytest.mark.parametrize("method", ["maxabs_arbitrary", "maxabs_pow2"])
@pytest.mark.parametrize("hp", ["bf16", "fp32"])
def test_scales_held_as_numbers(device, gemm, method, hp):
    layer = gaudi_layer(device, "fp8", method, hp, fmt="scalar")
    assert isinstance(layer.scale_weight, float)
    with torch.no_grad():
        close(fa.base_of(layer).linear(inputs(hp)), layer(inputs(hp)))


@pytest.mark.parametrize(("state", "method"), [s for s in SHORT if s[0] != "fake"])
def test_the_gemm_is_given_what_inc_gives_it(device, state, method):
    layer, x = gaudi_layer(device, state, method), inputs("bf16")
    with torch.no_grad():
        device.gemms.clear()
        layer(x)
        fa.base_of(layer).linear(x)
    theirs, ours = device.gemms
    assert torch.equal(theirs[0].float().flatten(0, 1), ours[0].float())
    assert theirs[1].data_ptr() == ours[1].data_ptr()  # the weight as it lies, [in, out]
    assert theirs[2] == ours[2]
    assert torch.equal(theirs[3].broadcast_to(2, 3, 1).flatten(), ours[3].broadcast_to(6, 1)[:, 0])
    assert torch.equal(theirs[4], ours[4])


def exact(base: IncFp8, x: Tensor, like: Tensor) -> Tensor:
    """What the derivative is of, in float64: ``clamp(x) W + b``, the scale of ``like`` held."""
    scale = base._activation(like)[0].double()
    limit = base.layer.limit * scale
    assert base.bias is not None
    return x.clamp(-limit, limit) @ base.dequantize(torch.float64).mT + base.bias.double()


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_every_transform(device, gemm, state, method):
    base = fa.base_of(gaudi_layer(device, state, method, hp="fp32"))
    x, g = inputs("fp32").flatten(0, 1), normal(6, 8, seed=4)
    wide = x.double()

    def same(got: Tensor, want: Tensor) -> None:
        assert want.count_nonzero()
        # float32 sums of 16 products, against float64.
        bound = 16 * 2.0**-23 * float(want.abs().max())
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=bound)

    inner = grad(lambda x: (exact(base, x, x.float().detach()) * g).sum())(wide)
    same(grad(lambda x: (base.linear(x) * g).sum())(x), inner)
    leaf = x.clone().requires_grad_()
    same(torch.autograd.grad((base.linear(leaf) * g).sum(), leaf)[0], inner)
    # What vmap maps over is one call to each: a scale of its own where scales are dynamic.
    same(vmap(base.linear)(x), torch.stack([base.linear(row) for row in x]))
    rows = [grad(lambda r, k=k: (exact(base, r, x[k]) * g[k]).sum())(wide[k]) for k in range(6)]
    each = vmap(grad(lambda x, g: (base.linear(x) * g).sum()))(x, g)
    same(each, torch.stack(rows))
    same(grad(lambda x: (vmap(base.linear)(x) * g).sum())(x), torch.stack(rows))
    t = normal(6, 16, seed=5)
    want = jvp(lambda x: exact(base, x, x.float().detach()), (wide,), (t.double(),))[1]
    out, tangent = jvp(base.linear, (x,), (t,))
    same(tangent, want)
    same(out, base.linear(x))
    same(jacrev(base.linear)(x[0]), jacrev(lambda r: exact(base, r, x[0]))(wide[0]))
    second = hessian(lambda r: base.linear(r).square().sum())(x[0])
    jacobian = jacrev(lambda r: exact(base, r, x[0]))(wide[0])
    same(second, 2 * jacobian.mT @ jacobian)


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_compiled(device, state, method):
    base = fa.base_of(gaudi_layer(device, state, method, hp="fp32"))
    x = inputs("fp32").flatten(0, 1).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return base.linear(x).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(x).detach(), loss(x).detach())
    close(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0])
    x = x.detach()
    close(torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(x), grad(loss)(x))


@pytest.mark.parametrize(
    ("state", "method", "fmt"),
    [(*s, "const") for s in SHORT] + [("fp8", "maxabs_arbitrary", "scalar")],
)
@pytest.mark.parametrize(
    "kind",
    [fa.LoRA(rank=2, alpha=8), fa.DoRA(rank=2), fa.OFT(block_size=4)],
    ids=["lora", "dora", "oft"],
)
def test_merged_layers_are_run_by_inc(device, state, method, fmt, kind):
    layer = gaudi_layer(device, state, method, hp="fp32", fmt=fmt)
    base, x = fa.base_of(layer), inputs("fp32")
    again = base.requantize(base.dequantize())
    assert torch.equal(again.weight.view(torch.int8), base.weight.view(torch.int8))
    assert torch.equal(again.scale, base.scale)
    model = nn.Sequential(layer)
    params = randomized(fa.init(kind, model, generator=torch.Generator().manual_seed(0)), 0)
    for scales in ("auto", "fresh", "keep"):
        merged = assert_pure(
            lambda scales=scales: fa.merged_model(model, params, kind, scales=scales), model, params
        )
        new = merged[0]
        assert isinstance(new, PatchedLinear)
        assert {k: (v.shape, v.dtype) for k, v in new.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
        }
        if state != "fake":
            assert type(new.scale_weight) is type(layer.scale_weight)
        read = fa.base_of(new)
        want = kind.merge(base.dequantize(), params["0"])
        # Half a step of e4m3: 3 bits of mantissa; 2**-9 is its smallest number.
        bound = torch.maximum(want.abs() * 2.0**-4, read.scale * 2.0**-10) * (1 + 1e-5)
        # A fresh scale, amax / limit, is itself rounded: times limit it may be an ulp short.
        inside = want.abs() <= read.layer.limit * read.scale * (1 + 2.0**-22)
        assert inside.all() or scales == "keep"
        assert ((read.dequantize() - want).abs() <= bound)[inside].all()
        with torch.no_grad():
            y = new(x)
        close(read.linear(x), y)
        if fmt == "const" or torch.equal(read.scale, base.scale):
            state_dict = fa.merge(model, params, kind, scales=scales)
            with torch.no_grad():
                assert torch.equal(functional_call(model, state_dict, (x,)), y)
        else:
            with pytest.raises(fa.errors.UnsupportedLayerError, match="as a number"):
                fa.merge(model, params, kind, scales=scales)


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_several_adapters_in_order_every_rounding_and_the_way_back(device, state, method):
    """One rounding for all of them; the same bytes again; and other formats from this one."""
    model = nn.Sequential(gaudi_layer(device, state, method, hp="fp32"))
    kinds = [fa.LoRA(rank=2, alpha=8), fa.DoRA(rank=2), fa.OFT(block_size=4)]
    g = torch.Generator().manual_seed(0)
    params = [randomized(fa.init(k, model, generator=g), i) for i, k in enumerate(kinds)]
    old, x = fa.base_of(model[0]), inputs("fp32")
    want = old.dequantize().double()
    for kind, adapter in zip(kinds, params, strict=True):
        want = kind.merge(want, tree_map(lambda t: t.double(), adapter["0"]))
    moments = {"0": x.flatten(0, 1).T @ x.flatten(0, 1)}
    for rounding in ("nearest", "search", "feedback", "stochastic"):
        told = {"rounding": rounding, "moments": moments, "generator": g}
        run = lambda told=told: fa.merged_model(model, params, kinds, undo=True, **told)  # noqa: E731
        merged, undo = run() if rounding == "stochastic" else assert_pure(run, model, params)
        new = fa.base_of(merged[0])
        error = (new.dequantize() - want).abs()
        # Half a step of e4m3 by nearest, a whole one by chance.
        step = torch.maximum(want.abs() * 2.0**-3, new.scale * 2.0**-9) * (1 + 1e-5)
        if rounding in ("nearest", "stochastic"):
            assert bool((error <= step / (2 if rounding == "nearest" else 1)).all())
        with torch.no_grad():
            close(new.linear(x), merged[0](x))
        back = fa.base_of(fa.unmerged_model(merged, params, kinds, undo=undo)[0])
        assert torch.equal(back.weight.view(torch.int8), old.weight.view(torch.int8))
        assert torch.equal(back.scale, old.scale)
    for to in ("float32", "int8"):
        other = fa.merged_model(model, params, kinds, to=to)[0]
        assert type(other) is nn.Linear
        off = (fa.base_of(other).dequantize(torch.float32) - want).abs()
        half = 1e-5 if to == "float32" else fa.base_of(other).scale / 2 * (1 + 1e-4)
        assert bool((off <= half).all())


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_lora_over_it_is_lora_over_incs_forward(device, gemm, state, method):
    layer, x = gaudi_layer(device, state, method, hp="fp32"), inputs("fp32")
    model, lora = nn.Sequential(layer), fa.LoRA(rank=2, alpha=8)
    fresh = fa.init(lora, model, generator=torch.Generator().manual_seed(0))
    params, forward = randomized(fresh, 0), fa.bind(model, lora)
    assert torch.equal(forward(fresh, x), forward(None, x))
    A, B = params["0"]
    with torch.no_grad():
        close(forward(params, x), layer(x) + (x @ A.mT @ B.mT) * 4)


def test_habanas_bridge_is_imported_for_its_own_device_alone(tmp_path, monkeypatch):
    """A module of its name, as no Gaudi is at hand; it registers the GEMM when it is imported."""
    (tmp_path / "habana_frameworks").mkdir()
    (tmp_path / "habana_frameworks" / "torch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    name = "habana_frameworks.torch"
    inc_fp8._load_gaudi(torch.device("cpu"))
    assert name not in sys.modules
    inc_fp8._load_gaudi(torch.device("hpu"))
    assert sys.modules[name].__file__ == str(tmp_path / "habana_frameworks" / "torch.py")
    for found in (name, "habana_frameworks"):
        monkeypatch.delitem(sys.modules, found)


def test_dynamic_scales_by_incs_op_or_without_it(device, monkeypatch):
    """INC makes them with an op of Gaudi's unless CALC_SCALE_WITH_CGUID is off: the same numbers.

    On other devices that op does not exist, and fadapt does without.
    """
    x = inputs("fp32")
    with_op = fa.base_of(gaudi_layer(device, "dynamic", "maxabs_pcs_pow2", "fp32")).linear(x)
    common.is_calc_scale_with_cguid.cache_clear()
    monkeypatch.setenv("CALC_SCALE_WITH_CGUID", "False")
    layer = gaudi_layer(device, "dynamic", "maxabs_pcs_pow2", "fp32")
    common.is_calc_scale_with_cguid.cache_clear()
    assert not layer.quant_input.input_scales_creator.calc_scale_with_cguid
    with torch.no_grad():
        close(with_op, layer(x))
    with pytest.raises(fa.errors.UnsupportedLayerError, match="made by FixedScale"):
        fa.base_of(gaudi_layer(device, "dynamic", "unit_scale"))
    for method in DYNAMIC:  # a row of zeros has no scale: INC's own is 0 * inf
        base = fa.base_of(gaudi_layer(device, "dynamic", method, "fp32"))
        assert torch.equal(base.linear(torch.zeros(2, 16)), base.bias.expand(2, 8))


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_an_empty_batch(device, gemm, state, method):
    base = fa.base_of(gaudi_layer(device, state, method, hp="fp32"))
    for shape in ((0, 16), (2, 0, 16)):
        y, pull = vjp(base.linear, torch.zeros(shape))
        assert y.shape == (*shape[:-1], 8)
        assert pull(y)[0].shape == shape


@pytest.mark.parametrize(("state", "method"), SHORT)
def test_what_inc_loads_is_read_the_same(device, state, method):
    layer, x = gaudi_layer(device, state, method), inputs("bf16")
    back = loaded_layer(device, layer, state, method)
    assert back.quantization_mode.name == "LOAD"
    base = fa.base_of(back)
    assert torch.equal(base.dequantize(), fa.base_of(layer).dequantize())
    got = assert_pure(lambda: base.linear(x), back, x)
    with torch.no_grad():
        close(got, back(x))
