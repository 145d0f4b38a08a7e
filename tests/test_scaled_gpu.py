"""The GPU kernel that dequantizes int8 and float8 weights, beside plain torch: the same bits."""

from importlib.util import find_spec

import pytest
import torch

from fadapt.bases import fp8, int8_product
from fadapt.kernels import scaled_gpu

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None,
    reason="a Triton kernel: it needs a GPU, and nothing stands in for one",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(
    ("scale_dtype", "dtype"), [(torch.float32, d) for d in DTYPES] + [(d, d) for d in DTYPES]
)
def test_int8(dtype, scale_dtype, group, zero):
    for shape in ((6, 96), (5, 2048 + 32), (3, 8)):
        if group and shape[1] % group:
            continue
        groups = shape[1] // group if group else 1
        codes = (50 * draw(*shape)).clamp(-128, 127).to(torch.int8)
        scale = draw(shape[0], groups).abs().to(scale_dtype)
        zeros = (50 * draw(shape[0], groups)).clamp(-128, 127).to(torch.int8) if zero else None
        assert scaled_gpu.usable(codes, scale, zeros, dtype)
        want = int8_product.dequantize(codes, scale, zeros, dtype)
        assert torch.equal(scaled_gpu.dequantize(codes, scale, zeros, dtype), want)
        assert torch.equal(scaled_gpu.dequantize(codes, None, None, dtype), codes.to(dtype))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8(dtype, kind):
    for shape in ((6, 96), (5, 2048 + 16)):
        codes, scale = draw(*shape).to(kind), draw(shape[0], 1).abs()
        if kind is torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("a GPU before Ada has no e4m3")
        assert scaled_gpu.usable(codes, scale, None, dtype)
        want = fp8.dequantize(codes, scale, dtype)
        assert torch.equal(scaled_gpu.dequantize(codes, scale, None, dtype), want)
