"""Laws 5, 6 and 7 of a merge over every format with a grid, by hypothesis; and over each what keeps
its bytes: an unchanged weight, a hundred cycles, in a state or in a module.

AQLM, which has no grid, is in test_merge_aqlm.py; INC's states of a Gaudi in test_inc_states.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F16, inc, torchao
from cases import dense as dense_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from inc_layers import PCS
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.quant_primitives import MappingType
from torchao_int8 import dynamic, weight_only

import fadapt as fa
from fadapt.errors import AdapterError
from fadapt.merging import merge_layers
from fadapt.plan import plan
from fadapt.testing import assert_pure

F32, BF16 = torch.float32, torch.bfloat16
EPS = torch.finfo(F32).eps


def intx(bits: int, **settings: Any) -> Callable[[], Any]:
    kind = getattr(torch, f"int{bits}")
    return lambda: IntxWeightOnlyConfig(weight_dtype=kind, **settings)


def dynamic_int4() -> Any:
    kind = PerGroup(4)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=kind)


# torchao's configurations; None for dense; a method of scales for INC.
FORMATS: dict[str, Any] = {
    "dense": None,
    "int8-row": lambda: weight_only(PerRow()),
    "int8-group": lambda: weight_only(PerGroup(4)),
    "int8-tensor": lambda: weight_only(PerTensor()),
    "int8-dynamic": dynamic,
    "float8": Float8WeightOnlyConfig,
    "int2-row": intx(2, granularity=PerAxis(0)),
    "int4-group": intx(4, granularity=PerGroup(4)),
    "int5-asymmetric": intx(5, granularity=PerGroup(8), mapping_type=MappingType.ASYMMETRIC),
    "int4-dynamic": dynamic_int4,
    "inc": "maxabs_arbitrary",
    "inc-channel": PCS,
}
SHORT = {F32: "fp32", BF16: "bf16", F16: "fp16"}
formats = pytest.mark.parametrize("name", FORMATS)


def layer_of(name: str, n_in: int, n_out: int, dtype: torch.dtype) -> nn.Module:
    how = FORMATS[name]
    if how is None:
        return dense_layer(n_in, n_out, dtype)
    made = inc(SHORT[dtype], how) if isinstance(how, str) else torchao(how, dtype)
    return made(n_in, n_out)


def adapter_of(model: nn.Module, method: Any, size: float, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    fresh = fa.init(method, model, generator=g)
    return tree_map(lambda t: t + size * torch.randn(t.shape, generator=g).to(t), fresh)


def half_step(base: Any, weight: torch.Tensor) -> torch.Tensor:
    """Half the distance of the format's numbers around each element of ``weight``."""
    if isinstance(base, fa.Dense):
        return weight.abs().clamp(min=1e-30) * torch.finfo(base.dtype).eps / 2
    scale, grid = base.scale.double(), base.grid()
    if grid.kind.is_floating_point:  # 3 bits of mantissa; the smallest numbers are 2**-9 apart
        return torch.maximum(weight.abs() * 2.0**-4, scale * 2.0**-10)
    half = (scale / 2).repeat_interleave(weight.shape[1] // scale.shape[1], 1).expand_as(weight)
    # torchao's symmetric scale is amax / ((2**bits - 1) / 2), so the largest code is half a step
    # short of amax; an asymmetric one's zero point is itself rounded. Either by half a step.
    return half * 2 if grid.high < 127 else half


def slack(base: Any, weight: torch.Tensor) -> float:
    """Sums in float32; scales (intx's, INC's) that are held in a low dtype round the largest code's
    value by its eps."""
    low = 0.0
    if not isinstance(base, fa.Dense):
        low = torch.finfo(base.scale.dtype).eps
    return float((64 * EPS + low) * weight.abs().amax())


def same_bytes(a: Any, b: Any) -> bool:
    if hasattr(a, "__tensor_flatten__"):
        return all(same_bytes(getattr(a, n), getattr(b, n)) for n in a.__tensor_flatten__()[0])
    a, b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def cases(draw: Any) -> Any:
    """A model of one layer, one to three methods and their adapters, in order."""
    name = draw(st.sampled_from([*FORMATS]))
    dtype = draw(st.sampled_from([F32, BF16, F16]))
    n_in, n_out = 8 * draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 8, 24]))
    model = nn.Sequential(layer_of(name, n_in, n_out, dtype)).eval()
    kinds = st.sampled_from(
        [
            *(fa.LoRA(rank=r, alpha=3, rslora=r == 3, lora_bias=r == 1) for r in (1, 2, 3)),
            fa.DoRA(rank=2),
            fa.OFT(block_size=4),
            fa.OFT(block_size=8, cayley="neumann"),
        ]
    )
    methods = draw(st.lists(kinds, min_size=1, max_size=3))
    sizes = st.sampled_from([1e-4, 0.02, 0.2])
    adapters = [adapter_of(model, m, draw(sizes), k) for k, m in enumerate(methods)]
    return model, methods, adapters


@settings(max_examples=80, deadline=None)
@given(case=cases(), scales=st.sampled_from(["auto", "fresh"]))
def test_the_laws(case, scales):
    model, methods, adapters = case
    run = lambda: fa.merged_model(model, adapters, methods, undo=True, scales=scales)  # noqa: E731
    merged, undo = assert_pure(run, model, adapters)
    old, new = fa.base_of(model[0]), fa.base_of(merged[0])
    assert type(merged[0]) is type(model[0])
    assert type(new) is type(old)
    want = old.dequantize(F32).double()
    for method, adapter in zip(methods, adapters, strict=True):
        want = method.merge(want, tree_map(lambda t: t.double(), adapter["0"]))
    # 5: rounded once, within half a step of the sum.
    error = (new.dequantize(F32).double() - want).abs()
    assert bool((error <= half_step(new, want) * (1 + 1e-5) + slack(new, want)).all())
    # 7: the vendor runs it.
    x = torch.randn(3, old.in_features, generator=torch.Generator().manual_seed(0)).to(old.dtype)
    with torch.no_grad():
        y, ours = merged[0](x), new.linear(x)
    eps = torch.finfo(old.dtype).eps  # law 2's: sums of up to 32 products, in another order
    torch.testing.assert_close(y, ours, rtol=32 * eps, atol=32 * eps * float(ours.abs().max()))
    # 6: exactly back with the record, and within a step of the grid without it.
    back = assert_pure(lambda: fa.unmerged_model(merged, adapters, methods, undo=undo), merged)
    check_same(back, model)
    if any(isinstance(m, fa.DoRA) for m in methods):
        with pytest.raises(AdapterError, match="norms"):
            fa.unmerge(merged, adapters, methods)
        return
    near = fa.base_of(fa.unmerged_model(merged, adapters, methods)[0])
    W = old.dequantize(F32).double()
    # Half a step of the merged grid, which a rotation by blocks of 8 spreads over 8 elements, and
    # half a step of the grid that it comes back to.
    spread = half_step(new, want).amax() * (8 if any(isinstance(m, fa.OFT) for m in methods) else 1)
    bound = spread + half_step(near, W).amax() + slack(new, want) + slack(near, W)
    assert bool(((near.dequantize(F32).double() - W).abs() <= bound).all())


def check_same(model: nn.Module, other: nn.Module) -> None:
    """The bases of both are the same bytes."""
    one, two = (fa.base_of(m[0]) for m in (model, other))
    assert type(one) is type(two)
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
        assert same_bytes(a, b)


@formats
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_unchanged_weight_gives_back_its_bytes(name, dtype):
    """What it dequantizes to, in float32 and in its own dtype; and an adapter that does nothing."""
    base = fa.base_of(layer_of(name, 16, 8, dtype))
    for kind in (F32, dtype):
        again = base.requantize(base.dequantize(kind))
        for one, two in zip(tree_leaves(again), tree_leaves(base), strict=True):
            assert same_bytes(one, two)
    if name != "dense":  # which has NaN and Inf of its own
        broken = base.dequantize(F32).clone()
        broken[1, 2], broken[3, 4] = math.nan, math.inf
        with pytest.raises(AdapterError, match=r"holds (2 )?NaN or Inf"):
            base.requantize(broken)
    model = nn.Sequential(layer_of(name, 16, 8, dtype))
    for method in (fa.LoRA(rank=2), fa.OFT(block_size=4)):
        nothing = fa.init(method, model, generator=torch.Generator().manual_seed(0))
        state = fa.merge(model, nothing, method)
        held = dict(model.named_parameters())
        assert all(same_bytes(state[n], held[n]) for n in state if n in held)


@formats
def test_a_hundred_cycles_end_on_the_same_bytes(name):
    """By modules; and by states, which run in the layer that they were merged from."""
    start, method = nn.Sequential(layer_of(name, 16, 8, BF16)), fa.LoRA(rank=2)
    now, x = start, torch.ones(1, 16, dtype=BF16)
    number = getattr(getattr(fa.base_of(start[0]), "layer", None), "held", None) is not None
    for k in range(100):
        params = adapter_of(start, method, 0.2, k)
        merged, undo = fa.merged_model(now, params, method, undo=True)
        if not number:  # INC's scale of a tensor is in no state
            state, same = fa.merge(now, params, method, undo=True)
            assert torch.equal(functional_call(now, state, (x,)), merged(x))
            assert all(map(torch.equal, tree_leaves(same), tree_leaves(undo)))
            back = fa.unmerge(merged, params, method, undo=undo)
            held = dict(start.named_parameters())
            assert all(same_bytes(tensor, held[n]) for n, tensor in back.items())
        now = fa.unmerged_model(merged, params, method, undo=undo)
    check_same(now, start)


@formats
def test_kept_scales_saturate_and_the_report_counts_it(name):
    model, method = nn.Sequential(layer_of(name, 16, 8, F32)), fa.LoRA(rank=2)
    params = adapter_of(model, method, 0.8, 0)
    report = fa.merge_report(model, params, method, scales="keep").layers["0"]
    ((_, adapted, merged),) = merge_layers(plan(model, params, method), scales="keep")
    assert report.saturated == merged.saturated
    base = adapted.base
    if name == "dense":
        assert merged.saturated == 0
        return
    grid = base.grid()
    assert torch.equal(merged.base.scale, base.scale)
    assert report.kept == merged.kept == 1.0
    levels = grid.levels(adapted.dequantize())
    if grid.kind.is_floating_point:  # what rounds down to the largest number is not beyond it
        beyond = levels.abs() >= grid.high * (1 + 2.0**-5 + 2.0**-7)
    else:
        beyond = (levels.round() < grid.low) | (levels.round() > grid.high)
    assert merged.saturated >= int(beyond.sum()) > 0
    codes = merged.base.codes().float()
    assert bool((codes[beyond].abs() >= grid.high).all())
    fresh = fa.merge_report(model, params, method, scales="fresh").layers["0"]
    # A block's amax lies on the last half step, and beyond it where its scale was rounded down.
    assert fresh.saturated <= (merged.base.scale.numel() if base.scale.dtype != F32 else 0)
