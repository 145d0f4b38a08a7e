"""Aqlm: both layouts of the codes, AQLM's own numbers, and derivatives where AQLM's are wrong."""

import warnings

import pytest
import torch
from aqlm.utils import _dequantize_weight, unpack_int_data
from aqlm_layers import quantized, used
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fadapt as fa
from fadapt.bases.aqlm import Aqlm, aqlm_layer
from fadapt.errors import AdapterError, ConfigError, FrozenBaseError, UnsupportedLayerError
from fadapt.testing import assert_pure

# (codebooks, bits, in group, out group): those that are published, and odd ones.
FORMATS = [(1, 16, 8, 1), (2, 8, 8, 1), (1, 8, 8, 1), (3, 8, 4, 1), (2, 5, 4, 2), (1, 12, 16, 1)]


def theirs(layer):
    """The weight by AQLM's own functions, of a layer that has not run."""
    codes = unpack_int_data(layer.codes, layer.nbits_per_codebook)
    return _dequantize_weight(codes, layer.codebooks, layer.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_weight_and_the_product(fmt, dtype):
    layer = quantized(fmt, dtype=dtype)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    base = assert_pure(lambda: fa.base_of(layer), layer)
    assert base.codes.data_ptr() == layer.codes.data_ptr()
    assert (base.in_features, base.out_features, base.dtype) == (64, 16, dtype)
    weight = assert_pure(lambda: base.dequantize(), layer)
    assert torch.equal(weight, theirs(layer))
    y = assert_pure(lambda: base.linear(x), layer, x)
    exact = x.double() @ base.dequantize(torch.float64).mT + layer.bias.double()
    assert y.dtype == dtype
    # Each rounding (product, scale, bias) is within eps of the largest term, in x's own dtype; in
    # float32 the sum of 64 products adds its own.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=eps * exact.abs().max().item())


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_in_both_directions(fmt):
    base = fa.base_of(quantized(fmt, 16, 6))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, dtype=torch.float64, generator=g, requires_grad=True)
    assert gradcheck(base.linear, x, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("n_out", [64, 32])
@pytest.mark.parametrize("fmt", [(2, 8, 8, 1), (1, 16, 8, 1)])
def test_a_layer_that_has_run(fmt, n_out):
    n_in = 8 * n_out  # as many groups in as out: the shapes tell nothing
    before = fa.base_of(quantized(fmt, n_in, n_out))
    layer = used(quantized(fmt, n_in, n_out))
    after = assert_pure(lambda: fa.base_of(layer), layer)
    assert after.codes.data_ptr() == layer.codes.data_ptr()
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.dequantize(), before.dequantize())
    x = torch.randn(2, n_in, generator=torch.Generator().manual_seed(1))
    # Sums of n_in float32 products, in another order.
    torch.testing.assert_close(after.linear(x), layer(x), rtol=1e-5, atol=1e-5)
    # The base outlives the permutation: it keeps what it read.
    early = quantized(fmt, n_in, n_out)
    kept = fa.base_of(early)
    used(early)
    assert torch.equal(kept.dequantize(), before.dequantize())


def test_the_gradient_where_that_of_aqlm_is_wrong():
    layer = used(quantized((2, 8, 8, 1), 128, 16, bias=False))
    base = fa.base_of(layer)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = base.dequantize(torch.float64).sum(0)
    (ours,) = torch.autograd.grad(base.linear(x).sum(), x)
    # 16 float32 terms a sum.
    torch.testing.assert_close(ours[0].double(), exact, rtol=1e-5, atol=1e-5)
    wide = x.detach().double().requires_grad_()
    assert gradcheck(base.linear, wide)
    (vendor,) = torch.autograd.grad(layer(x).sum(), x)
    # A note of the defect: if this fails, AQLM has repaired its backward.
    assert (vendor[0] - exact).norm() > 0.5 * exact.norm()


def test_out_groups_after_a_forward_that_is_wrong_in_aqlm():
    fresh = fa.base_of(quantized((1, 8, 4, 4), 32, 32))
    layer = used(quantized((1, 8, 4, 4), 32, 32))
    assert torch.equal(fa.base_of(layer).dequantize(), fresh.dequantize())


def test_codes_of_another_shape_are_refused():
    layer = quantized()
    layer.codes.data = layer.codes.data[:-1]
    with pytest.raises(UnsupportedLayerError, match=r"\(15, 8, 2\).*\(16, 8, 2\)"):
        fa.base_of(layer)


def test_transforms_and_the_frozen_tensors():
    base = fa.base_of(quantized())
    weight = base.dequantize(torch.float64)
    g = torch.Generator().manual_seed(1)
    xs = torch.randn(4, 3, 64, dtype=torch.float64, generator=g)
    exact = xs @ weight.mT + base.bias.double()
    # float64: sums of 64 products in another order.
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(vmap(base.linear)(xs), exact, **near)
    slopes = vmap(grad(lambda x: base.linear(x).square().sum()))(xs)
    torch.testing.assert_close(slopes, 2 * exact @ weight, **near)
    _, moved = jvp(base.linear, (xs,), (xs + 1,))
    torch.testing.assert_close(moved, (xs + 1) @ weight.mT, **near)
    with pytest.raises(FrozenBaseError, match="dequantize"):
        grad(lambda b: Aqlm(base.codes, b, base.scales).linear(xs.float()).sum())(base.codebooks)
    train = grad(lambda b: Aqlm(base.codes, b, base.scales).dequantize().sum())(base.codebooks)
    assert train.abs().sum() > 0


def test_backward_saves_the_codes_alone():
    base = fa.base_of(quantized((2, 8, 8, 1), 512, 512))
    x = torch.randn(2, 512, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        base.linear(x)
    assert sum(saved.values()) == sum(
        t.untyped_storage().nbytes() for t in (base.codes, base.codebooks, base.scales)
    )


def test_a_tracer_sees_the_product():
    base = fa.base_of(quantized())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    traced = make_fx(lambda x: base.linear(x))(x)
    # Sums of 64 float32 products, in another order.
    torch.testing.assert_close(traced(2 * x), base.linear(2 * x), rtol=1e-5, atol=1e-5)


def test_a_trace_of_torch_sees_it_too():
    base = fa.base_of(quantized())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and warns of shapes
        traced = torch.jit.trace(base.linear, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), base.linear(2 * x), rtol=1e-5, atol=1e-5)


def test_rows():
    base = fa.base_of(quantized((2, 5, 4, 2), 64, 16))
    part = base.rows(slice(4, 10))
    assert torch.equal(part.dequantize(), base.dequantize()[4:10])
    assert torch.equal(part.bias, base.bias[4:10])
    assert part.codebooks.data_ptr() == base.codebooks.data_ptr()
    with pytest.raises(ConfigError, match="multiples of 2"):
        base.rows(slice(3, 8))


def test_the_state_runs_in_a_fresh_layer():
    layer = used(quantized((2, 8, 8, 1), 128, 16))
    base = fa.base_of(layer)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    state = assert_pure(base.state, layer)
    # AQLM replaces the data of the codes it is given: of the state's own tensor, not the base's.
    y = assert_pure(
        lambda: functional_call(quantized((2, 8, 8, 1), 128, 16), state, x), base, layer
    )
    assert torch.equal(y, layer(x))
    assert torch.equal(assert_pure(lambda: aqlm_layer(base)(x), base, layer), y)


def test_bind_over_a_model_of_aqlm_layers():
    model = nn.Sequential(quantized(n_out=32), nn.Tanh(), quantized((1, 16, 8, 1), 32, 8)).eval()
    method = fa.LoRA(rank=2)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    assert list(params) == ["0", "2"]
    forward = fa.bind(model, method)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    y = assert_pure(lambda: forward(params, x), model, forward, params, x)
    # Against AQLM itself, which then permutes the model's codes; the bound forward is untouched.
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(forward(params, x), y)
    # The other layout is summed in another order.
    torch.testing.assert_close(fa.bind(model, method)(params, x), y, rtol=1e-5, atol=1e-5)


def test_a_state_over_a_layer_that_has_run():
    model = nn.Sequential(quantized(n_in=64, n_out=8, bias=False))  # 8 groups in, 8 out
    method = fa.LoRA(rank=2)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    state = {f"0.{name}": t.clone() for name, t in fa.base_of(model[0]).state().items()}
    want = fa.bind(model, method)(params, x)
    used(model[0])
    found = assert_pure(lambda: fa.bind(model, method, state=state)(params, x), model, state)
    assert torch.equal(found, want)
    # The layer's own tensors lie as it holds them.
    own = fa.bind(model, method, state=model.state_dict())(params, x)
    torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-5)


def test_layers_that_are_not_adapted_are_differentiated_through_and_not_written_to():
    # AQLM's own first call on a CPU permutes the codes, and its backward is wrong from then on.
    first, second = nn.Linear(16, 64), quantized((2, 8, 8, 1), 64, 16)
    model = nn.Sequential(first, second)
    method = fa.LoRA(rank=2, targets=["0"])
    g = torch.Generator().manual_seed(0)
    many = fa.stack([fa.init(method, model, generator=g) for _ in range(2)])
    many["0"] = many["0"]._replace(lora_B=torch.randn(2, 64, 2, generator=g))
    x = torch.randn(3, 16, generator=g)
    dense = nn.Linear(64, 16)
    dense.weight.data, dense.bias.data = fa.base_of(second).dequantize(), second.bias.data
    forward, plain = (fa.bind(nn.Sequential(first, m), method) for m in (second, dense))
    step = [fa.value_and_grad(lambda p, f=f: f(p, x).square().mean(), 0) for f in (forward, plain)]
    got = assert_pure(lambda: step[0](many), model, many)
    torch.testing.assert_close(got, step[1](many))


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("run", [False, True])
def test_an_input_of_another_width_is_refused(width, run):
    layer = quantized((1, 8, 8, 1), 16, 8)
    base = fa.base_of(used(layer) if run else layer)
    with pytest.raises(AdapterError, match=rf"16 inputs was given \[2, {width}\]"):
        base.linear(torch.zeros(2, width))
