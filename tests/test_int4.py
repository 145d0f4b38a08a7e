"""4 bit weights: Int4Tensor by its format's formula, Int4OpaqueTensor by its own CPU kernel."""

import pytest
import torch
from cases import BF16, F16, F32, dense, randomized
from int4_layers import int4, int4_weight, opaque, tile_packed
from torch import nn
from torch.func import grad
from torchao.quantization import (
    Int4PlainInt32Tensor,
    Int4PreshuffledTensor,
    Int4TilePackedTo4dTensor,
)

import fadapt as fa
from fadapt.bases.int4 import Int4, pack, unpack
from fadapt.bases.int4_packed import _unpacked
from fadapt.errors import UnsupportedLayerError
from fadapt.testing import assert_pure

dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
kinds = pytest.mark.parametrize("make", [int4, opaque], ids=["plain", "opaque"])


def layer_of(make, dtype=F32, n_in=64, n_out=48):
    return make(dense(n_in, n_out, dtype).requires_grad_(False))


def normal(*shape, dtype=F32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def held(weight):
    return [getattr(weight, name) for name in weight.tensor_data_names]


def test_nibbles():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)
    assert torch.equal(unpack(pack(codes)), codes)
    # Byte 0 holds -8 and, above it, -7: 0x98.
    assert pack(codes)[0, 0] == torch.tensor(0x98, dtype=torch.uint8).view(torch.int8)


@dtypes
def test_int4_tensor_is_its_formula(dtype):
    layer = layer_of(int4, dtype)
    base = fa.base_of(layer)
    exact = int4_weight(layer)
    # q * scale + zero_point of 4 and of at most 24 bits each: in float64 without rounding.
    assert torch.equal(base.dequantize(torch.float64), exact)
    rounded = (base.dequantize().double() - exact).abs()
    # float32's product and sum are each rounded; a lower dtype's once, from float32.
    assert (rounded <= torch.finfo(dtype).eps * exact.abs().max()).all()
    assert base.qdata.data_ptr() == layer.weight.qdata.data_ptr()
    assert base.scale.data_ptr() == layer.weight.scale.data_ptr()
    x = normal(5, 64, dtype=dtype)
    y = assert_pure(lambda: base.linear(x), layer, x)
    want = x.double() @ base.dequantize().double().mT + base.bias.double()
    # float32 sums of 64; a lower dtype's are rounded before and after the bias.
    assert (y - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@dtypes
@pytest.mark.parametrize("n_out", [16, 48, 64, 176])
def test_int4_opaque_tensor_is_unpacked_as_its_kernel_reads_it(dtype, n_out):
    layer = layer_of(opaque, dtype, n_out=n_out)
    base, weight = fa.base_of(layer), layer.weight
    params = torch.stack([torch.ones(2, n_out), torch.zeros(2, n_out)], -1)
    codes = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(64), weight.qdata, 32, params).mT
    assert torch.equal(base.codes().float(), codes)
    x = normal(2, 3, 64, dtype=dtype)
    y = assert_pure(lambda: base.linear(x), layer, x)
    # Both round the sum, and both the bias; theirs in float32 sums in another order, by halves.
    eps = torch.finfo(dtype).eps * (8 if dtype == F32 else 2)
    assert (y - layer(x)).abs().max() <= eps * y.abs().max()


@dtypes
@kinds
def test_what_is_given_back_is_the_same_tensor(make, dtype):
    layer = layer_of(make, dtype)
    base = fa.base_of(layer)
    for scales in ("auto", "keep"):
        again = base.requantize(base.dequantize(F32), scales).state()["weight"]
        assert type(again) is type(layer.weight.data)
        assert str(again) == str(layer.weight.data)
        assert all(map(torch.equal, held(again), held(layer.weight)))


@dtypes
@kinds
def test_merging_keeps_to_half_a_step_and_undoes_to_the_bit(make, dtype):
    model, method = nn.Sequential(layer_of(make, dtype)), fa.LoRA(rank=2, alpha=4)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params = randomized(params, 0)
    merged, undo = assert_pure(
        lambda: fa.merged_model(model, params, method, undo=True), model, params
    )
    old, new = fa.base_of(model[0]), fa.base_of(merged[0])
    exact = method.merge(old.dequantize(F32), params["0"])
    step = new.scale.float().repeat_interleave(64 // new.scale.shape[1], 1)
    error = (new.dequantize(F32) - exact).abs()
    # Half a step; and the rounding of a low dtype's W, which the merge begins with.
    assert (error <= 0.5001 * step + torch.finfo(dtype).eps * exact.abs().max()).all()
    back = fa.unmerge(merged, params, method, undo=undo)["0.weight"]
    assert all(map(torch.equal, held(back), held(model[0].weight)))
    if make is opaque:  # whose kernel runs here: torchao runs what was merged
        x = normal(5, 64, dtype=dtype)
        eps = torch.finfo(dtype).eps * (8 if dtype == F32 else 2)
        y = merged[0](x)
        assert (new.linear(x) - y).abs().max() <= eps * y.abs().max()


@kinds
def test_a_merge_and_its_inverse_settle(make):
    model, method = nn.Sequential(layer_of(make)), fa.LoRA(rank=2, alpha=4)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params, old, errors = randomized(params, 0), fa.base_of(model[0]).dequantize(), []
    for _ in range(12):
        model = fa.merged_model(model, params, method)
        model[0].weight = nn.Parameter(fa.unmerge(model, params, method)["0.weight"], False)
        errors.append(float((fa.base_of(model[0]).dequantize() - old).norm()))
    assert errors[-1] <= 1.5 * errors[0]


@kinds
def test_backward_keeps_the_nibbles_and_a_pre_scale_multiplies(make):
    layer = layer_of(make)
    layer.weight.act_pre_scale = 1 + normal(64, seed=3).abs()
    base, x = fa.base_of(layer), normal(3, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = base.linear(x.clone().requires_grad_())
    large = [t for t in saved if t.numel() >= base.qdata.numel()]
    assert [t.data_ptr() for t in large] == [base.qdata.data_ptr()]
    scaled = base.dequantize().double() * layer.weight.act_pre_scale
    want = x.double() @ scaled.mT + base.bias
    assert (y - want).abs().max() <= 8 * torch.finfo(F32).eps * want.abs().max()
    dx = grad(lambda x: base.linear(x).sum())(x)
    want = scaled.sum(0).expand(3, 64)
    assert (dx - want).abs().max() <= 8 * torch.finfo(F32).eps * want.abs().max()
    assert base.state()["weight"].act_pre_scale is layer.weight.act_pre_scale


def test_what_is_packed_for_another_kernel_says_what_is_read():
    zeros, shape = torch.zeros(16, 8, dtype=torch.int32), torch.Size([16, 64])
    scale = torch.ones(2, 16)
    packed = (
        Int4PlainInt32Tensor(zeros, scale, scale, [1, 32], shape),
        Int4PreshuffledTensor(zeros, scale, [1, 32], shape, group_zero=scale),
    )
    for weight in packed:
        layer = nn.Linear(64, 16)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        named = rf"{type(weight).__name__} is not read.*one kernel.*IntxWeightOnlyConfig.*mslk"
        with pytest.raises(UnsupportedLayerError, match=named):
            fa.base_of(layer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tinygemm's packing is CUDA's")
@pytest.mark.parametrize("shape", [(1024, 64), (64, 48), (1536, 44)], ids=str)
def test_tile_packed_is_unpacked_as_its_kernel_reads_it(shape):
    n_in, n_out = shape
    layer = tile_packed(dense(n_in, n_out, BF16).requires_grad_(False))
    base, weight = fa.base_of(layer), layer.weight
    params = torch.zeros_like(weight.scale_and_zero)
    params[..., 0] = 1
    eye = torch.eye(weight.qdata.shape[1] * 128, device="cuda", dtype=BF16)
    codes = torch.ops.aten._weight_int4pack_mm(eye, weight.qdata, 32, params).mT
    assert torch.equal(base.codes().to(BF16), codes[:n_out, :n_in])
    again = base.requantize(base.dequantize(F32)).state()["weight"]
    assert type(again) is type(weight.data)
    if n_in == 1024:  # nothing is padded
        assert all(map(torch.equal, held(again), held(weight)))
    x = normal(5, n_in, dtype=BF16).cuda()
    with torch.no_grad():
        y = layer(x)
        layer.weight = nn.Parameter(again, requires_grad=False)
        assert torch.equal(layer(x), y)
    # The kernel rounds W, the sum and the bias to bfloat16, as ours does.
    got = assert_pure(lambda: base.linear(x), layer, x)
    assert (got - y).abs().max() <= 3 * torch.finfo(BF16).eps * y.abs().max()
    dx = grad(lambda x: base.linear(x).float().sum())(x)
    want = base.dequantize().double().sum(0).expand(5, n_in)
    assert (dx - want).abs().max() <= 2 * torch.finfo(BF16).eps * want.abs().max()
    merged = fa.merged_model(nn.Sequential(layer), *adapter(nn.Sequential(layer)))
    y = fa.base_of(merged[0]).linear(x)
    with torch.no_grad():
        assert (merged[0](x) - y).abs().max() <= 3 * torch.finfo(BF16).eps * y.abs().max()


def adapter(model):
    method = fa.LoRA(rank=2, alpha=4)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    return randomized(params, 0), method


def test_tile_packed_is_read_on_cuda_alone():
    layer = nn.Linear(64, 16)
    zeros = torch.zeros(2, 1, 32, 4, dtype=torch.int32)
    weight = Int4TilePackedTo4dTensor(zeros, torch.ones(2, 16, 2), [1, 32], torch.Size([16, 64]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match=r"\[16, 64\].* on cpu.*tinygemm"):
        fa.base_of(layer)


def test_rounded_activations_are_refused():
    layer = layer_of(int4)
    layer.weight.activation_dtype = torch.float8_e4m3fn
    with pytest.raises(UnsupportedLayerError, match=r"float8_e4m3fn: fadapt reads.*bfloat16"):
        fa.base_of(layer)
    layer = layer_of(opaque)
    layer.weight.act_mapping_type = "symmetric"
    with pytest.raises(UnsupportedLayerError, match=r"rounded \(symmetric\).*Int8Dynamic"):
        fa.base_of(layer)


def test_an_order_that_is_not_by_blocks_of_rows_is_refused():
    codes = torch.randint(0, 16, (128, 8), generator=torch.Generator().manual_seed(0))

    def by_columns(codes):
        return pack(codes.to(torch.int8).mT.contiguous().reshape(1, -1))

    with pytest.raises(UnsupportedLayerError, match=r"\[128, 8\].*blocks of 64 rows"):
        _unpacked(by_columns(codes), by_columns, 128, 8)
    read = _unpacked(by_columns(codes[:64]), by_columns, 64, 8)
    assert torch.equal(read.to(torch.int64), codes[:64])


def test_describe_unpacks_nothing():
    (row,) = fa.describe(nn.Sequential(layer_of(int4, BF16)))
    assert row[1] == Int4.__name__
    assert row[3:5] == ("int4 -> bfloat16", "a scale for 4 of a row")
    assert row.bytes == 48 * 64 // 2 + 2 * (2 * 48 * 16) + 2 * 48
