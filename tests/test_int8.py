"""Int8: torchao's own numbers, and derivatives that hold where torchao's raise."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_map
from torchao.quantization import (
    Int8StaticActivationInt8WeightConfig,
    Int8Tensor,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao_int8 import (
    AFFINE_INT8,
    HAS_AFFINE,
    VERSION,
    affine,
    dynamic,
    inner,
    integers,
    scales,
    weight_only,
)

import fadapt as fa
from fadapt.bases import precision
from fadapt.testing import assert_pure

ASYMMETRIC = MappingType.ASYMMETRIC
WEIGHT_ONLY = {
    "per_row": weight_only(PerRow()),
    "per_group": weight_only(PerGroup(16)),
    "per_tensor": weight_only(PerTensor()),
}


def static(**options):
    scale = torch.tensor([[0.02]])
    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale, granularity=PerTensor(), **options
    )


DYNAMIC = {
    "dynamic": dynamic(),
    "dynamic_per_tensor": dynamic(granularity=PerTensor()),
    "static": static(),
}
if VERSION >= (0, 17):  # which has zero points
    DYNAMIC |= {
        "dynamic_mixed": dynamic(granularity=[PerRow(), PerTensor()]),
        "dynamic_asymmetric": dynamic(act_mapping_type=ASYMMETRIC),
        "static_asymmetric": static(
            act_quant_zero_point=torch.tensor([[-7]], dtype=torch.int8),
            act_mapping_type=ASYMMETRIC,
        ),
    }
if VERSION >= (0, 18):
    DYNAMIC["dynamic_reduced"] = dynamic(reduce_range=True)
if HAS_AFFINE:  # up to 0.17
    WEIGHT_ONLY |= {f"affine-{kind}": None for kind in AFFINE_INT8 if kind != "dynamic"}
    DYNAMIC["affine-dynamic"] = None
CONFIGS = WEIGHT_ONLY | DYNAMIC
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(kind, n_in=64, n_out=16, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g).to(dtype) / 4
    if kind.startswith("affine-"):
        return affine(layer, kind.removeprefix("affine-"))
    quantize_(layer, CONFIGS[kind])
    return layer


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def multiplied(base):
    """W as the op multiplies by it, in float64: by row the scale multiplies the product, exactly;
    by group W is rounded to its own dtype first."""
    by_value = base.by_value or base.block_size[1] < base.in_features
    return base.dequantize(None if by_value else torch.float64).double()


def as_torchao(dtype, kind):
    """What may lie between torchao's output and ours, as a share of the largest element."""
    if kind in WEIGHT_ONLY and dtype not in precision.CPU_GEMM_DTYPES:
        # torchao rounds after the product and after the scale; we multiply in float32 instead,
        # because this CPU only emulates x's dtype, and round once.
        return 2 * torch.finfo(dtype).eps
    old_group = kind == "per_group" and VERSION < (0, 17)
    if old_group or kind in ("affine-group", "affine-group-zeros", "affine-tensor"):
        # The older class's product by the dequantized W adds the bias before it rounds.
        return 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return 0.0


@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    dtype=st.sampled_from(DTYPES),
    n_in=st.sampled_from([16, 48, 64]),
    n_out=st.integers(1, 4).map(lambda k: 8 * k),
    shape=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
)
@settings(max_examples=120, deadline=None)
def test_the_output_is_torchaos(kind, dtype, n_in, n_out, shape, bias, seed, size):
    layer = quantized(kind, n_in, n_out, dtype, bias, seed)
    x = size * normal(*shape, n_in, dtype=dtype, seed=seed + 1)
    base = fa.base_of(layer)
    if kind.startswith("static"):  # torchao wants x of the scale's rank
        x = x.reshape(-1, n_in)
    with torch.no_grad():
        want = layer(x)
    got = assert_pure(lambda: base.linear(x), layer, base, x)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    # Equal infinities are equal: torchao's float16 overflows before the weight's scale, so do we.
    finite = want.double()[want.isfinite()]
    limit = as_torchao(dtype, kind) * (float(finite.abs().max()) if len(finite) else 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_dequantize_is_torchaos_bit_for_bit(kind, dtype):
    layer = quantized(kind, dtype=dtype)
    base = fa.base_of(layer)
    assert base.dtype == dtype
    theirs = inner(layer.weight)
    assert torch.equal(base.dequantize(), theirs.dequantize())
    assert torch.equal(base.dequantize(torch.float32), theirs.dequantize(torch.float32))


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_shares_the_layers_storage_and_writes_back_what_torchao_runs(kind):
    layer = quantized(kind)
    base = fa.base_of(layer)
    assert base.qdata.data_ptr() == integers(layer.weight).data_ptr()
    assert base.scale.data_ptr() == scales(layer.weight).data_ptr()
    assert (base.in_features, base.out_features, base.device.type) == (64, 16, "cpu")
    x = normal(3, 64)
    state = base.state()
    assert type(state["weight"]) is type(layer.weight)
    assert str(state["weight"]) == str(layer.weight.data)  # all that torchao tells of it
    again = torch.func.functional_call(layer, state, (x,))
    assert torch.equal(again, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_on_a_cpu_that_only_emulates_the_dtype(monkeypatch, kind, dtype):
    monkeypatch.setattr(precision, "CPU_GEMM_DTYPES", frozenset({torch.float32, torch.float64}))
    layer = quantized(kind, dtype=dtype)
    base, x = fa.base_of(layer), normal(3, 64, dtype=dtype)
    eps = torch.finfo(dtype).eps
    y = base.linear(x)
    want = x.double() @ multiplied(base).mT + base.bias.double()
    # float32 sums of 64, rounded to the dtype before and after the bias: half an eps each.
    assert y.dtype == dtype
    assert (y - want).abs().max() <= eps * want.abs().max()
    assert (y - layer(x)).abs().max() <= 2 * eps * want.abs().max()
    dx = grad(lambda x: base.linear(x).float().sum())(x)
    want = multiplied(base).sum(0).expand(3, 64)
    # The gradient times the scale, and its sum of 16, in float32; the result rounded once.
    assert dx.dtype == dtype
    assert (dx - want).abs().max() <= eps * want.abs().max()


@pytest.mark.parametrize("kind", ["per_row", "per_group", "dynamic"])
def test_bases_that_are_themselves_mapped_over(kind):
    """A stack of bases, an axis other than the first: a product for each, in order."""
    bases = [fa.base_of(quantized(kind, seed=k)) for k in range(3)]
    stack = tree_map(lambda *t: torch.stack(t, 1), *bases)
    x, xs = normal(4, 64), normal(3, 4, 64, seed=2)
    ys = torch.stack([base.linear(x) for base in bases])
    same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # sums of 64, in float32
    same(vmap(lambda b: b.linear(x), 1)(stack), ys)
    same(
        vmap(lambda b, x: b.linear(x), (1, 0))(stack, xs),
        torch.stack([base.linear(x) for base, x in zip(bases, xs, strict=True)]),
    )
    nested = vmap(vmap(lambda b, x: b.linear(x), (1, None)), (None, 0))(stack, xs)
    same(nested, torch.stack([torch.stack([base.linear(x) for base in bases]) for x in xs]))
    grads = vmap(lambda b: grad(lambda x: b.linear(x).square().sum())(x), 1)(stack)
    same(
        grads, 2 * torch.stack([y @ multiplied(b).float() for y, b in zip(ys, bases, strict=True)])
    )


@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), (80, torch.float32), (80, torch.bfloat16)]
)
def test_large_weights_multiply_by_blocks(rows, dtype):
    # More bytes than a block holds, for few rows and for many; the last block is a short one.
    n_in, n_out = (1024, 1100) if rows < 64 else (2048, 4200)
    base = fa.base_of(quantized("per_row", n_in, n_out))
    x = normal(rows, n_in).to(dtype).requires_grad_()
    y = base.linear(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    weight = base.qdata.float() * base.scale
    want = x.float() @ weight.mT + base.bias
    # float32 sums in another order: their error grows as the root of their length, 2**5 to 2**6.
    # bfloat16 rounds the product, the scale, the bias' sum and the gradient that comes in.
    tolerance = torch.finfo(dtype).eps * (2**6 if dtype == torch.float32 else 4)
    assert (y - want).abs().max() <= tolerance * want.abs().max()
    want = (2 * y.float()) @ weight
    assert (dx - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_is_that_of_the_exact_product(kind, dtype):
    base = fa.base_of(quantized(kind, dtype=dtype))
    x, g = normal(3, 64, dtype=dtype), normal(3, 16, dtype=dtype, seed=2)
    dx = grad(lambda x: (base.linear(x).float() * g.float()).sum())(x)
    want = g.double() @ multiplied(base)
    # W rounded to the dtype, or g times the scale: half an eps; the sum's result: another half.
    assert (dx - want).abs().max() <= 1.5 * torch.finfo(dtype).eps * want.abs().max()
    each = vmap(grad(lambda x, g: (base.linear(x).float() * g.float()).sum()))(x, g)
    assert (each - want).abs().max() <= 1.5 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("kind", ["per_row", "per_group", "dynamic"])
def test_gradients_batched_by_the_older_vmap(kind):
    base = fa.base_of(quantized(kind))
    x, weight = normal(3, 64).double(), multiplied(base)
    g = normal(4, 3, 16, seed=2).double()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(base.linear(x), x, g, is_grads_batched=True)
    # float64 throughout, 64 products a sum: only the order of the sums differs.
    torch.testing.assert_close(dx, g @ weight, rtol=1e-12, atol=1e-12)
    dy = jacobian(base.linear, x.detach()[0], vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(dy, weight, rtol=1e-12, atol=1e-12)


def saved_bytes(fn):
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = (t.dtype, t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    return held, out


@pytest.mark.parametrize("kind", CONFIGS)
def test_backward_keeps_the_int8_weight_and_no_float_copy(kind):
    base = fa.base_of(quantized(kind, 64, 64))
    x = normal(3, 64).requires_grad_()
    held, _ = saved_bytes(lambda: base.linear(x))
    assert base.qdata.data_ptr() in held
    # The largest thing kept beside the integers is the scales; a float W would be 16,384 bytes.
    floats = sum(size for dtype, size in held.values() if dtype.is_floating_point)
    assert floats == base.scale.untyped_storage().nbytes()
    layer = quantized(kind, 64, 64)
    if kind in (
        "per_row",
        "per_group",
        "affine-row",
        "affine-group",
    ):  # what torchao's own keeps, to show that the hook sees it
        theirs, _ = saved_bytes(lambda: layer(x))
        assert sum(s for d, s in theirs.values() if d.is_floating_point) >= 64 * 64 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", [k for k in ("per_row", "dynamic", "dynamic_asymmetric") if k in CONFIGS]
)
def test_a_pre_scale_multiplies_the_activation(kind, dtype):
    layer = quantized(kind, dtype=dtype)
    scale = (1 + normal(64, seed=3).abs()).to(dtype)
    layer.weight.act_pre_scale = scale
    base, x = fa.base_of(layer), normal(3, 64, dtype=dtype)
    with torch.no_grad():
        want = layer(x)
    limit = as_torchao(dtype, kind) * want.double().abs().max()
    assert (base.linear(x).double() - want.double()).abs().max() <= limit
    dx = grad(lambda x: base.linear(x).float().sum())(x)
    want = (scale.double() * multiplied(base).sum(0)).expand(3, 64)
    # As above, and one product more.
    assert (dx - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_requantizing_an_unchanged_weight_gives_the_same_bytes(kind, dtype):
    base = fa.base_of(quantized(kind, dtype=dtype))
    new = assert_pure(lambda: base.requantize(base.dequantize(torch.float32)), base)
    assert torch.equal(new.qdata, base.qdata)
    assert torch.equal(new.scale, base.scale)
    large = base.requantize(3 * base.dequantize(torch.float32))
    steps = large.dequantize(torch.float32) - 3 * base.dequantize(torch.float32)
    # Half a step of the new scale, which fresh symmetric scales overrun at their upper end (127.5
    # steps are clamped to 127): at most half a step more. And float32's rounding.
    assert (steps.abs() <= 0.501 * large.scale.max() + 1e-6).all()


def test_refusals():
    layer = quantized("per_row")
    cube = Int8Tensor.from_hp(normal(2, 16, 64), PerRow())
    layer.weight = nn.Parameter(cube, requires_grad=False)
    with pytest.raises(fa.errors.UnsupportedLayerError, match=r"shape \(2, 16, 64\)"):
        fa.base_of(layer)
    layer = quantized("per_row")
    groups = Int8Tensor.from_hp(normal(16, 64), PerGroup(16))
    groups.act_quant_kwargs = quantized("dynamic").weight.act_quant_kwargs
    layer.weight = nn.Parameter(groups, requires_grad=False)
    with pytest.raises(fa.errors.UnsupportedLayerError, match="per group"):
        fa.base_of(layer)
    layer = quantized("static")
    layer.weight.act_quant_scale = torch.ones(3, 1)
    with pytest.raises(fa.errors.UnsupportedLayerError, match="one scale"):
        fa.base_of(layer)
    base = fa.base_of(quantized("per_row"))
    with pytest.raises(fa.errors.AdapterError, match=r"\(64, 16\).*\(16, 64\)"):
        base.requantize(normal(64, 16))
    scale = base.scale.clone().requires_grad_()
    y = replace(base, scale=scale).linear(normal(3, 64).requires_grad_())
    with pytest.raises(fa.errors.FrozenBaseError, match="frozen base"):
        y.sum().backward()


@pytest.mark.parametrize("kind", DYNAMIC)
def test_an_empty_batch(kind):
    base = fa.base_of(quantized(kind))
    for shape in ((0, 64), (2, 0, 64)):
        y, pull = vjp(base.linear, torch.zeros(shape))
        assert y.shape == (*shape[:-1], 16)
        assert pull(y)[0].shape == shape
