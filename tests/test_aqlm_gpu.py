"""The GPU kernels of AQLM beside the float64 product with the weight that plain torch decodes."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from aqlm_layers import quantized
from torch.func import vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fadapt as fa
from fadapt.kernels import aqlm_gpu

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None,
    reason="Triton kernels: they need a GPU, and nothing stands in for one",
)
FORMATS = [(1, 16, 8, 1), (2, 8, 8, 1), (1, 8, 8, 1), (3, 4, 4, 2), (1, 12, 16, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(fmt, n_in=272, n_out=42, dtype=torch.float32, permuted=False):
    base = fa.base_of(quantized(fmt, n_in, n_out, dtype).cuda())
    if permuted:
        codes = base.codes.transpose(0, 1).contiguous().transpose(0, 1)
        assert not codes.is_contiguous()
        base = replace(base, codes=codes)
    return base


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)


def check(got, want, dtype):
    # W, the product and the sum with the bias are each rounded to dtype, errors that partly cancel;
    # in float32 the sum of 272 products adds its own.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_both_products(fmt, permuted, dtype):
    base = on_gpu(fmt, dtype=dtype, permuted=permuted)
    weight = base.dequantize(torch.float64)
    for rows in (1, 2, 3, aqlm_gpu.MOST_ROWS, aqlm_gpu.MOST_ROWS + 1, 300):
        x, g = draw(rows, 272, dtype=dtype), draw(rows, 42, dtype=dtype)
        assert aqlm_gpu.usable(x, base.codes, base.codebooks)
        y, back = vjp(base.linear, x)
        check(y, x.double() @ weight.mT + base.bias.double(), dtype)
        check(back(g)[0], g.double() @ weight, dtype)
        leaf = x.clone().requires_grad_()
        base.linear(leaf).backward(g)
        assert torch.equal(leaf.grad, back(g)[0])
    many = draw(3, 2, 5, 272, dtype=dtype)
    check(vmap(base.linear, 1)(many), many.movedim(1, 0).double() @ weight.mT + base.bias, dtype)


@pytest.mark.parametrize("rows", [2, 20])
def test_where_the_kernels_do_not_run(rows):
    base = on_gpu((2, 8, 8, 1))
    weight = base.dequantize(torch.float64)
    # The older vmap, and a tracer, which would keep a kernel's result as a constant.
    x = draw(rows, 272)
    slope = torch.autograd.functional.jacobian(base.linear, x, vectorize=True)
    check(slope[1, :, 1], weight, torch.float32)
    traced = make_fx(lambda x: base.linear(x))(x)
    check(traced(2 * x), 2 * x.double() @ weight.mT + base.bias, torch.float32)
    wide = x.double()
    assert not aqlm_gpu.usable(wide, base.codes, base.codebooks)
    # float64: sums of 272 products in another order.
    exact = wide @ weight.mT + base.bias
    torch.testing.assert_close(base.linear(wide), exact, rtol=1e-12, atol=1e-12)
    odd = on_gpu((1, 4, 6, 1), 24)
    x = draw(rows, 24)
    assert not aqlm_gpu.usable(x, odd.codes, odd.codebooks)
    check(odd.linear(x), x.double() @ odd.dequantize(torch.float64).mT + odd.bias, torch.float32)


def test_tensors_that_begin_anywhere():
    base = on_gpu((2, 8, 8, 1), 24)  # 6 bytes of codes a row
    weight = base.dequantize(torch.float64)
    for rows in (2, 20):
        x = draw(rows, 24)
        for start in (0, 1, 2):  # aligned and not, in turn: each has its own compiled version
            part = base.rows(slice(start, 42))
            check(part.linear(x), x.double() @ weight[start:].mT + part.bias, torch.float32)
