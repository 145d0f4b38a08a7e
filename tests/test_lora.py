"""LoRA: its equation, initialisations, dtypes and merging, with PEFT's own layers as an oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import grad
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_int8 import HAS_AFFINE

import fadapt as fa
import fadapt.testing as ft
from fadapt.errors import ConfigError

pytestmark = [
    # PEFT's own: it calls a method that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT on a layer quantized by plain quantize_: it could not merge. Nothing is merged here.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(n_in=16, n_out=12, dtype=F32, bias=True, seed=0):
    g = seeded(seed)
    one = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    for p in one.parameters():
        p.data = (torch.randn(p.shape, generator=g, dtype=F64) / math.sqrt(n_in)).to(dtype)
    return one


def int8(*args, **kwargs):
    one = layer(*args, **kwargs)
    quantize_(one, Int8WeightOnlyConfig())
    return one


def random_params(method, model, seed=1):
    fresh = fa.init(method, model, generator=seeded(seed))
    g = seeded(seed)
    return tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=F64).to(t) / 4, fresh)


def by_hand(base, method, p, x):
    """The equation, in float64."""
    w, b = base.dequantize().double(), base.bias.double()
    bias = p.lora_bias.double() if hasattr(p, "lora_bias") else 0
    update = x.double() @ p.lora_A.double().mT @ p.lora_B.double().mT + bias
    return x.double() @ w.mT + b + method.scaling * update


# The equation, in every dtype


@pytest.mark.parametrize("own", [None, F32, BF16, F16, F64])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(m, d) for m in (layer, int8) for d in (F32, BF16, F16)] + [(layer, F64)],  # torchao: no F64
)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_the_update_is_computed_in_the_adapters_dtype(make, dtype, own, lora_bias):
    model = make(dtype=dtype)
    method = fa.LoRA(rank=3, alpha=5, lora_bias=lora_bias, dtype=own)
    params = random_params(method, model)
    assert {t.dtype for t in tree_leaves(params)} == {own or (F64 if dtype == F64 else F32)}
    x = torch.randn(4, 16, generator=seeded(2), dtype=F64).to(dtype)
    y = fa.bind(model, method)(params, x)
    assert y.dtype == dtype
    want = by_hand(fa.base_of(model), method, params[""], x)
    # Base and sum each rounded to the layer's dtype; x, A x and B A x to the adapter's.
    eps = 2 * torch.finfo(dtype).eps + 3 * torch.finfo(own or F32).eps
    assert (y - want).abs().max() <= eps * want.abs().max()
    if own in (None, F32) and dtype in (BF16, F16):
        # and not in the base's: the update alone is float32's, rounded once.
        zero = tree_map(torch.zeros_like, params)
        update = y.double() - fa.bind(model, method)(zero, x).double()
        assert (update - (want - by_hand(fa.base_of(model), method, zero[""], x))).abs().max() <= (
            2 * torch.finfo(dtype).eps * want.abs().max()
        )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("make", "keywords"),
    [
        (layer, {}),
        (layer, {"use_rslora": True}),
        (layer, {"lora_bias": True}),
        (int8, {}),
        (int8, {"use_rslora": True}),  # PEFT refuses lora_bias on a torchao layer
    ],
)
def test_pefts_layer_on_the_same_weights(make, dtype, keywords):
    model = nn.Sequential(make(dtype=dtype))
    names = {"use_rslora": "rslora"}
    ours = fa.LoRA(rank=4, alpha=6, **{names.get(k, k): v for k, v in keywords.items()})
    params = random_params(ours, model)
    x = torch.randn(4, 16, generator=seeded(2)).to(dtype)
    forward = fa.bind(model, ours)
    got = forward(params, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = forward(params, x)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **keywords)
    theirs = get_peft_model(model, config, autocast_adapter_dtype=True)
    own = theirs.base_model.model[0]
    with torch.no_grad():
        own.lora_A["default"].weight.copy_(params["0"].lora_A)
        own.lora_B["default"].weight.copy_(params["0"].lora_B)
        if ours.lora_bias:
            own.lora_B["default"].bias.copy_(params["0"].lora_bias)
        want = theirs(x)
        with torch.autocast("cpu", torch.bfloat16):
            want_low = theirs(x)
    assert got.dtype == want.dtype == dtype
    # PEFT scales B A x, we A x: a rounding more or less, in the adapter's dtype and the result's.
    assert (got - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    # torchao's newer class does not see autocast, and stays in x's dtype; ours obeys it always.
    assert low.dtype == BF16
    assert want_low.dtype == (BF16 if make is layer or HAS_AFFINE else dtype)
    limit = 4 * torch.finfo(BF16).eps * want.abs().max()  # A x and B A x in bfloat16 as well
    assert (low.float() - want_low.float()).abs().max() <= limit


def test_autocast_decides_the_dtype_of_the_product():
    model, method = layer(), fa.LoRA(rank=2)
    params, forward = random_params(method, model), fa.bind(model, method)
    x = torch.randn(4, 16, generator=seeded(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = ft.assert_pure(lambda: forward(params, x), model, forward, params)
        grads = grad(lambda p: forward(p, x).float().square().sum())(params)
    assert y.dtype == BF16
    assert {g.dtype for g in tree_leaves(grads)} == {F32}
    want = by_hand(fa.base_of(model), method, params[""], x)
    # x, W, A, B, A x and the results each rounded to bfloat16.
    assert (y - want).abs().max() <= 4 * torch.finfo(BF16).eps * want.abs().max()
    with torch.autocast("cpu", enabled=False):
        assert forward(params, x).dtype == F32


# Hyperparameters


@pytest.mark.parametrize("method", [fa.LoRA(rank=2), fa.DoRA(rank=2), fa.OFT(block_size=4)])
def test_autocast_changes_no_merge(method):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    g = torch.Generator().manual_seed(0)
    params = fa.init(method, model, generator=g)
    params = {
        p: type(v)(*(t + 0.1 * torch.randn(t.shape, generator=g) for t in v))
        for p, v in params.items()
    }
    want, back = fa.merge(model, params, method), fa.merged_model(model, params, method)
    ready = fa.bind(model, method).prepare(params)
    undone = fa.unmerge(back, ready, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fa.merge(model, params, method)["0.weight"], want["0.weight"])
        again = fa.unmerge(back, ready, method)
        assert torch.equal(again["0.weight"], undone["0.weight"])


def test_scaling():
    assert fa.LoRA(rank=8).scaling == 1
    assert fa.LoRA(rank=8, alpha=16).scaling == 2
    assert fa.LoRA(rank=16, alpha=8, rslora=True).scaling == 2
    assert fa.LoRA(rank=8, alpha=0).scaling == 0


def test_patterns_set_rank_and_alpha_layer_by_layer():
    model = nn.ModuleDict({"up": layer(seed=1), "down": layer(seed=2), "updown": layer(seed=3)})
    method = fa.LoRA(
        rank=2, alpha=8, rank_pattern={"up": 4, "u.*n": 1}, alpha_pattern={"down": 3, ".*": 5}
    )
    params = fa.init(method, model, generator=seeded())
    assert {p: leaf.lora_A.shape[0] for p, leaf in params.items()} == {
        "up": 4,
        "down": 2,
        "updown": 1,
    }
    at = method.at(list(params))
    assert {p: m.scaling for p, m in at.items()} == {"up": 5 / 4, "down": 3 / 2, "updown": 5.0}


# Initialisations


@given(
    n_in=st.integers(1, 40), n_out=st.integers(1, 40), rank=st.integers(1, 8), bias=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_kaiming(n_in, n_out, rank, bias):
    model = layer(n_in, n_out)
    p = fa.init(fa.LoRA(rank=rank, lora_bias=bias), model, generator=seeded())[""]
    assert p.lora_A.shape == (rank, n_in)
    assert p.lora_B.shape == (n_out, rank)
    assert p.lora_A.abs().max() <= 1 / math.sqrt(n_in)
    assert not p.lora_B.any()
    assert not getattr(p, "lora_bias", torch.zeros(1)).any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_distribution_of_a(init):
    a = fa.init(fa.LoRA(rank=64, init=init), layer(256), generator=seeded())[""].lora_A
    n = a.numel()
    std = 1 / math.sqrt(3 * 256) if init == "kaiming" else 1 / 64
    # Five standard errors of a mean, and of a standard deviation (a normal's is the larger).
    assert a.mean().abs() <= 5 * std / math.sqrt(n)
    assert (a.std() / std - 1).abs() <= 5 / math.sqrt(2 * n)
    rows = a @ a.mT / (256 * std**2) - torch.eye(64)
    assert rows.abs().max() <= 8 * math.sqrt(2 / 256)  # the rows differ


def test_orthogonal():
    # PEFT's orthogonal_init: BA = 0 though neither is, so there is a gradient in both at once.
    model = layer(32, 24, F64)
    method = fa.LoRA(rank=6, init="orthogonal")
    params = fa.init(method, model, generator=seeded())
    p = params[""]
    assert p.lora_A.count_nonzero() == p.lora_A.numel()
    assert p.lora_B.count_nonzero() == p.lora_B.numel()
    scale = p.lora_A.abs().max() * p.lora_B.abs().max()
    # The numbers are drawn in float32, the factors orthogonal to its rounding.
    assert (p.lora_B @ p.lora_A).abs().max() <= 32 * torch.finfo(F32).eps * scale
    grads = grad(lambda q: fa.bind(model, method)(q, torch.ones(1, 32, dtype=F64)).sum())(params)
    assert all(g.abs().max() > 1e-3 for g in tree_leaves(grads))


@pytest.mark.parametrize("make", [layer, int8])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_return_the_base_that_they_need(init, dtype, make):
    model = nn.Sequential(make(dtype=dtype), nn.Tanh(), make(12, 8, dtype=dtype))
    method = fa.LoRA(rank=4, alpha=6, init=init)
    params, residual = ft.assert_pure(lambda: fa.init(method, model), model)
    assert {n.split(".")[-1] for n in residual} >= {"weight"}
    x = torch.randn(3, 16, generator=seeded(2)).to(dtype)
    old, new = fa.bind(model, method), fa.bind(model, method, state=residual)
    for path, leaf in params.items():
        base, left = old.layers[path].base, new.layers[path].base
        delta = method.scaling * leaf.lora_B.double() @ leaf.lora_A.double()
        assert torch.linalg.matrix_rank(delta) == 4
        error = (left.dequantize(F32).double() + delta - base.dequantize(F32).double()).abs()
        if make is int8:
            # Half a step of the residual's grid, or a whole one at the upper end of a fresh scale.
            assert (error <= 1.001 * left.scale.double().abs()).all()
            assert (error <= 0.501 * left.scale.double().abs()).double().mean() > 0.95
        else:
            # The residual rounded to the layer's dtype, at its own size.
            limit = torch.finfo(dtype).eps * left.dequantize().double().abs().max()
            assert error.max() <= limit
        if init == "pissa":
            # The best of rank r: what is left is the tail of the spectrum (Eckart and Young).
            tail = torch.linalg.svdvals(base.dequantize(F32).double())[4:]
            got = torch.linalg.svdvals(base.dequantize(F32).double() - delta)[: len(tail)]
            torch.testing.assert_close(got, tail, rtol=1e-4, atol=1e-5)  # an SVD in float32
        else:
            q = leaf.lora_B.double()
            # Orthonormal columns, to float32's rounding in a QR of 16 rows.
            assert (q.mT @ q - torch.eye(4, dtype=F64)).abs().max() <= 64 * torch.finfo(F32).eps
    y, want = new(params, x).double(), old(None, x).double()
    step = 0.0 if make is layer else 0.02  # of the int8 grid, 1/255 an element, over 16 products
    assert (y - want).abs().max() <= (8 * torch.finfo(dtype).eps + step) * want.abs().max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_start_where_pefts_do(init):
    model = nn.Sequential(layer())
    method = fa.LoRA(rank=4, alpha=6, init=init)
    params, residual = fa.init(method, model)
    ours = method.scaling * params["0"].lora_B @ params["0"].lora_A
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    theirs = get_peft_model(model, config).base_model.model[0]
    # Factors are unique up to signs, their product is unique: float32's SVD or QR of 12 x 16.
    torch.testing.assert_close(ours, theirs.get_delta_weight("default"), rtol=0, atol=1e-5)
    torch.testing.assert_close(residual["0.weight"], theirs.base_layer.weight, rtol=0, atol=1e-5)


def test_pissa_of_more_than_the_weight_has():
    with pytest.raises(ConfigError, match=r"rank 9 of a weight of shape \(8, 16\).*at most 8"):
        fa.init(fa.LoRA(rank=9, init="pissa"), layer(16, 8))


def test_numbers_are_drawn_in_the_models_order_from_the_generator_alone():
    model = nn.Sequential(layer(), layer(12, 8))
    one = ft.assert_pure(lambda: fa.init(fa.LoRA(rank=2), model, generator=seeded(5)), model)
    g = seeded(5)
    for path in ("0", "1"):
        alone = fa.init(fa.LoRA(rank=2, targets=[path]), model, generator=g)
        assert torch.equal(alone[path].lora_A, one[path].lora_A)
    low = fa.init(fa.LoRA(rank=2, dtype=BF16), model, generator=seeded(5))
    assert torch.equal(low["1"].lora_A, one["1"].lora_A.to(BF16))


# Merging, as the method knows it: a function of a float weight


@given(data=st.data(), one=ft.linears(dtype=ft.dtypes(F64)))
@settings(max_examples=40, deadline=None)
def test_merge_by_rows_is_applying_and_unmerge_undoes_it(data, one):
    method = data.draw(ft.methods(one, [fa.LoRA]))
    (p,) = data.draw(ft.adapters(one, method)).values()
    x = data.draw(ft.inputs(one))
    weight, bias = one.weight.detach(), None if one.bias is None else one.bias.detach()
    merged = ft.assert_pure(lambda: method.merge(weight, p), weight, p)
    parts = [method.merge(weight[k : k + 1], p, slice(k, k + 1)) for k in range(len(weight))]
    # float64: sums of at most 4 products, rounded in another order.
    torch.testing.assert_close(torch.cat(parts), merged, rtol=1e-13, atol=1e-13)
    whole = method.merge_bias(bias, p)
    y = method.apply(fa.base_of(one), p, x)
    want = x @ merged.mT + (0 if whole is None else whole)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(method.unmerge(merged, p), weight, rtol=1e-12, atol=1e-13)
    if bias is not None:
        torch.testing.assert_close(method.unmerge_bias(whole, p), bias, rtol=1e-12, atol=1e-13)
