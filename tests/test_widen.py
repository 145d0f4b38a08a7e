"""float8 codes as floats: torch's own numbers bit for bit, by the fast way and by torch's."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fadapt.bases import widen as module
from fadapt.bases.widen import widen

CODES = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
FINITE = torch.where(CODES & 0x7F == 0x7F, 0, CODES)
SCALES = {
    "one": torch.tensor([[0.37]]),
    "row": torch.rand(16, 1, generator=torch.Generator().manual_seed(0)) * 1e-38,  # subnormal too
    "column": torch.rand(1, 16, generator=torch.Generator().manual_seed(1)) * 1e30,
    "bfloat16": torch.full((16, 1), 0.3, dtype=torch.bfloat16),
}


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.stride() == want.stride()
    assert torch.equal(got.isnan(), want.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    number = ~want.isnan()
    assert torch.equal(got.view(bits)[number], want.view(bits)[number])  # -0.0 is not 0.0


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [1, 80, 2**18])
def test_every_code(monkeypatch, kind, scale, dtype, block):
    monkeypatch.setattr(module, "BLOCK", block)
    wide = torch.promote_types(dtype, torch.float32)
    for raw in (CODES, FINITE):
        codes = raw.view(kind)
        for layout in (codes, codes.mT, codes[:, ::2], codes[3:]):
            s = SCALES[scale]
            s = s[: len(layout)] if len(s) > 1 else s[:, : layout.shape[1]]
            before = layout.clone().view(torch.uint8)
            same(widen(layout, s, dtype), (layout.to(wide) * s.to(wide)).to(dtype))
            assert torch.equal(layout.view(torch.uint8), before)


def test_which_way_is_taken():
    kind, one = torch.float8_e4m3fn, SCALES["one"]
    assert module._movable(FINITE.view(kind), one)
    assert not module._movable(CODES.view(kind), one)  # its NaN
    assert not module._movable(FINITE.view(torch.float8_e5m2), one)
    assert not module._movable(FINITE.view(kind), one.clone().requires_grad_())


def test_what_is_traced_mapped_or_differentiated_goes_torchs_way():
    codes, scale = FINITE.view(torch.float8_e4m3fn), SCALES["column"].mT.contiguous()
    want = codes.float() * scale
    same(vmap(lambda s: widen(codes, s, torch.float32))(torch.stack([scale, scale]))[1], want)
    same(vmap(lambda c: widen(c, scale, torch.float32))(torch.stack([codes, codes]))[1], want)
    slope = grad(lambda s: widen(codes, s, torch.float32).sum())(scale)
    torch.testing.assert_close(slope, codes.float().sum(1, keepdim=True))
    leaf = scale.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(widen(codes, leaf, torch.float32).sum(), leaf)[0], slope)
    with FakeTensorMode() as mode:
        fake = widen(mode.from_tensor(codes), mode.from_tensor(scale), torch.float32)
    assert fake.shape == codes.shape
    graph = make_fx(lambda s: widen(codes, s, torch.float32))(scale)
    same(graph(2 * scale), codes.float() * (2 * scale))
    x = torch.ones(16, 16)
    argument = grad(lambda x, c: (x * widen(c, scale, torch.float32)).sum())(x, codes)
    assert torch.equal(argument, want)
    compiled = torch.compile(widen, fullgraph=True, backend="eager")
    same(compiled(codes, scale, torch.float32), want)
