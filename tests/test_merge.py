"""merge, merged_model, unmerge: laws 5 to 8, exact undo, refusals; the vendors run what is merged.

AQLM is in test_merge_aqlm.py, folders in test_merge_folder.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization import PerGroup, PerRow, PerTensor, quantize_
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
from fadapt.errors import AdapterError, ConfigError, MergeError
from fadapt.testing import assert_pure

FORMATS: dict[str, Callable[[], Any] | None] = {
    "dense": None,
    "int8-row": lambda: weight_only(PerRow()),
    "int8-tensor": lambda: weight_only(PerTensor()),
    "int8-group": lambda: weight_only(PerGroup(4)),
    "int8-dynamic": dynamic,
    **({f"affine-{kind}": None for kind in AFFINE_INT8} if HAS_AFFINE else {}),
}
METHODS = {
    "lora": fa.LoRA(rank=2, alpha=3),
    "lora-bias": fa.LoRA(rank=3, lora_bias=True, rslora=True),
    "dora": fa.DoRA(rank=2),
    "oft": fa.OFT(block_size=4),
}


def quantized(layer: nn.Module, name: str) -> nn.Module:
    config = FORMATS[name]
    if config is not None:
        quantize_(layer, config())
    elif name != "dense":
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
            affine(linear, name.removeprefix("affine-"))
    return layer


def model_of(name: str, n_in: int = 16, n_out: int = 12, dtype=torch.float32, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(n_in, n_out), nn.Linear(n_out, 8, bias=False)
    net = nn.Sequential(first, nn.Tanh(), last).to(dtype).eval()
    return quantized(net, name)


def adapter_of(model: nn.Module, method: Any, size: float = 0.1, seed: int = 1) -> Any:
    g = torch.Generator().manual_seed(seed)
    fresh = fa.init(method, model, generator=g)
    return tree_map(lambda t: t + size * torch.randn(t.shape, generator=g).to(t), fresh)


def wanted(model: nn.Module, params: Any, method: Any) -> dict[str, torch.Tensor]:
    """W + ΔW in float64, by the method's own merge of the whole weight."""
    at = method.at(list(params))
    return {
        path: at[path].merge(
            fa.base_of(model.get_submodule(path)).dequantize(torch.float32).double(),
            tree_map(lambda t: t.double(), leaf),
        )
        for path, leaf in params.items()
    }


def half_step(base: Any, weight: torch.Tensor) -> torch.Tensor:
    """Half the distance of neighbouring numbers of the format, at each element of ``weight``."""
    if isinstance(base, fa.Dense):
        return weight.abs().clamp(min=1e-30) * torch.finfo(base.dtype).eps / 2
    blocks = base.scale.repeat_interleave(weight.shape[1] // base.scale.shape[1], 1)
    return (blocks / 2).expand_as(weight).double()


def same_bytes(a: Any, b: Any) -> bool:
    if hasattr(a, "__tensor_flatten__"):
        return torch.equal(integers(a), integers(b)) and torch.equal(scales(a), scales(b))
    return a.dtype == b.dtype and torch.equal(a, b)


def all_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


formats = pytest.mark.parametrize("name", FORMATS)
methods = pytest.mark.parametrize("kind", METHODS)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_law_5_within_half_a_step_of_the_sum(data):
    name, kind = data.draw(st.sampled_from([*FORMATS])), data.draw(st.sampled_from([*METHODS]))
    n_in, n_out = 4 * data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 4, 12, 20]))
    n_out = 4 * n_out
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = data.draw(st.sampled_from([1e-4, 0.01, 0.1, 0.5]))
    seed = data.draw(st.integers(0, 9))
    scales = data.draw(st.sampled_from(["auto", "fresh"]))
    model, method = model_of(name, n_in, n_out, dtype, seed), METHODS[kind]
    params = adapter_of(model, method, size, seed)
    merged = assert_pure(
        lambda: fa.merged_model(model, params, method, scales=scales), model, params
    )
    for path, target in wanted(model, params, method).items():
        new = fa.base_of(merged.get_submodule(path))
        assert type(new) is type(fa.base_of(model.get_submodule(path)))
        error = (new.dequantize(torch.float32).double() - target).abs()
        # W + ΔW is summed in float32: `in` products of OFT's blocks of 4, or of a rank of 2 or 3.
        slack = 16 * torch.finfo(torch.float32).eps * target.abs().amax()
        half = half_step(new, target)
        if scales == "fresh" and name != "dense":
            # A fresh scale is torchao's own, which up to 0.17 is rounded to the weight's dtype: the
            # 127.5 steps, or 255 from a zero point, of one rounded down fall short by as many
            # times half an eps, of its own size or of the smallest normal number's.
            about = torch.finfo(new.scale.dtype)
            steps = 127.5 if new.zero_point is None else 255
            slack = slack + steps * about.eps * half.clamp(min=about.tiny / 2)
        assert bool((error <= half * (1 + 1e-5) + slack).all())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_law_6_unmerge_is_within_a_step_and_exact_with_the_record(data):
    name, kind = data.draw(st.sampled_from([*FORMATS])), data.draw(st.sampled_from([*METHODS]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    size, seed = data.draw(st.sampled_from([1e-4, 0.05, 0.4])), data.draw(st.integers(0, 9))
    model, method = model_of(name, dtype=dtype, seed=seed), METHODS[kind]
    params = adapter_of(model, method, size, seed)
    merged, undo = fa.merged_model(model, params, method, undo=True)
    old = all_state(model)
    back = assert_pure(lambda: fa.unmerge(merged, params, method, undo=undo), merged, params, undo)
    assert all(same_bytes(back[n], old[n]) for n in old)
    if kind == "dora":
        with pytest.raises(AdapterError, match="norms"):
            fa.unmerge(merged, params, method)
        return
    near = fa.unmerge(merged, params, method)
    for path in params:
        was, now = fa.base_of(model.get_submodule(path)), fa.base_of(merged.get_submodule(path))
        got = merged.get_submodule(path)
        again = functional_base(got, near, path)
        W = was.dequantize(torch.float32).double()
        # Half a step of the merged grid, which a rotation of 4 by 4 blocks spreads over 4 elements
        # (their norm at most doubles), and half a step of the grid that it comes back to.
        spread = half_step(now, wanted(model, params, method)[path]).amax() * (
            2 if kind == "oft" else 1
        )
        bound = spread + half_step(again, W).amax() + 32 * torch.finfo(torch.float32).eps
        assert bool(((again.dequantize(torch.float32).double() - W).abs() <= bound).all())


def functional_base(layer: nn.Module, state: Any, path: str) -> Any:
    shell = nn.Linear(layer.in_features, layer.out_features, bias=False)
    shell.weight = nn.Parameter(state[f"{path}.weight"], requires_grad=False)
    return fa.base_of(shell)


@formats
@methods
def test_law_7_the_vendor_runs_what_was_merged(name, kind):
    model, method = model_of(name), METHODS[kind]
    params = adapter_of(model, method, 0.05)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    state = assert_pure(lambda: fa.merge(model, params, method), model, params)
    merged = fa.merged_model(model, params, method)
    by_vendor = merged(x)
    assert torch.equal(functional_call(model, state, (x,)), by_vendor)
    if name != "dense":
        new, old = merged[0].weight, model[0].weight
        assert type(new) is type(old)
        assert type(inner(new)) is type(inner(old))
        assert tuple(inner(new).block_size) == tuple(inner(old).block_size)
        for rounds in ("act_quant_kwargs", "input_quant_func"):
            assert str(getattr(new, rounds, None)) == str(getattr(old, rounds, None))
    want = fa.bind(model, method)(params, x)
    # Two layers of 16 and 12 products with random errors of half a step, |w| / 256, each; the
    # activations' rounding, where there is one, is another such error. Dense: float32 sums.
    bound = 1e-5 if name == "dense" else 0.03
    assert float((by_vendor - want).norm() / want.norm()) < bound


@formats
def test_merging_a_fresh_adapter_changes_no_byte(name):
    model = model_of(name)
    for rounding in ("nearest", "stochastic"):
        for method in (METHODS["lora"], METHODS["oft"]):
            params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
            g = torch.Generator().manual_seed(0)
            state = fa.merge(model, params, method, rounding=rounding, generator=g)
            old = all_state(model)
            assert all(same_bytes(state[n], old[n]) for n in state)


@formats
def test_a_hundred_cycles_end_on_the_same_bytes(name):
    method = METHODS["lora"]
    model = start = model_of(name, dtype=torch.bfloat16)
    for k in range(100):
        params = adapter_of(model, method, 0.2, k)
        merged, undo = fa.merged_model(model, params, method, undo=True)
        state = fa.unmerge(merged, params, method, undo=undo)
        for path in params:
            for leaf in ("weight", "bias"):
                if f"{path}.{leaf}" in state:
                    tensor = nn.Parameter(state[f"{path}.{leaf}"], requires_grad=False)
                    setattr(merged.get_submodule(path), leaf, tensor)
        model = merged
    now, old = all_state(model), all_state(start)
    assert all(same_bytes(now[n], old[n]) for n in old)


@formats
def test_without_a_record_the_drift_stops_after_the_first_cycle(name):
    method = METHODS["lora"]
    model = model_of(name)
    params = adapter_of(model, method, 0.05)
    errors = []
    W = fa.base_of(model[0]).dequantize(torch.float32)
    for _ in range(20):
        merged = fa.merged_model(model, params, method)
        state = fa.unmerge(merged, params, method)
        for path in params:
            merged.get_submodule(path).weight = nn.Parameter(
                state[f"{path}.weight"], requires_grad=False
            )
        model = merged
        errors.append(float((fa.base_of(model[0]).dequantize(torch.float32) - W).norm() / W.norm()))
    # Kept scales: the second merge finds the grid that the first one made.
    assert errors[-1] <= 2 * errors[0] + 1e-6


@formats
def test_several_adapters_are_rounded_once(name):
    model = model_of(name)
    kinds = [METHODS["lora"], METHODS["dora"], METHODS["oft"]]
    params = [adapter_of(model, m, 0.05, k) for k, m in enumerate(kinds)]
    merged, undo = fa.merged_model(model, params, kinds, undo=True)
    W = fa.base_of(model[0]).dequantize(torch.float32).double()
    for method, adapter in zip(kinds, params, strict=True):
        W = method.merge(W, tree_map(lambda t: t.double(), adapter["0"]))
    new = fa.base_of(merged[0])
    error = (new.dequantize(torch.float32).double() - W).abs()
    slack = 64 * torch.finfo(torch.float32).eps * W.abs().amax()
    assert bool((error <= half_step(new, W) * (1 + 1e-5) + slack).all())
    back = fa.unmerge(merged, params, kinds, undo=undo)
    old = all_state(model)
    assert all(same_bytes(back[n], old[n]) for n in old)


def test_kept_scales_saturate_and_are_counted():
    from fadapt.merging import merge_layers
    from fadapt.plan import plan

    model, method = model_of("int8-row"), METHODS["lora"]
    params = adapter_of(model, method, 0.5)
    for choice, kept in (("keep", 1.0), ("fresh", 0.0)):
        for path, adapted, merged in merge_layers(plan(model, params, method), scales=choice):
            W = wanted(model, params, method)[path]
            levels = (W / adapted.base.scale).round()
            beyond = int(((levels < -128) | (levels > 127)).sum())
            if choice == "keep":
                assert merged.saturated == beyond > 0
                assert torch.equal(merged.base.scale, adapted.base.scale)
            assert merged.kept == kept


@pytest.mark.parametrize(
    "to", ["float32", "bfloat16", "int8", "int8-tensor", "int8-group4", "int8-dynamic"]
)
@pytest.mark.parametrize("name", ["dense", "int8-row"])
def test_another_format_by_name(name, to):
    model, method = model_of(name), METHODS["lora"]
    params = adapter_of(model, method)
    if "group" in to and VERSION < (0, 17):
        with pytest.raises(ConfigError, match="multiplies by no Int8Tensor"):
            fa.merged_model(model, params, method, to=to)
        return
    merged = assert_pure(lambda: fa.merged_model(model, params, method, to=to), model, params)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for path, target in wanted(model, params, method).items():
        layer = merged.get_submodule(path)
        assert type(layer) is nn.Linear
        new = fa.base_of(layer)
        error = (new.dequantize(torch.float32).double() - target).abs()
        slack = 8 * torch.finfo(torch.float32).eps * target.abs().amax()
        assert bool((error <= half_step(new, target) * (1 + 1e-5) + slack).all())
        if to == "int8-dynamic":  # the very numbers that torchao's own quantize_ makes
            theirs = nn.Linear(layer.in_features, layer.out_features, bias=False)
            theirs.weight = nn.Parameter(target.float(), requires_grad=False)
            quantize_(theirs, FORMATS["int8-dynamic"]())
            # Theirs is of a sum in float64: the amax differs by roundings.
            torch.testing.assert_close(theirs.weight.scale, layer.weight.scale, rtol=1e-6, atol=0)
            assert str(theirs.weight.act_quant_kwargs) == str(layer.weight.act_quant_kwargs)
    if to != "bfloat16":
        merged(x)
    with pytest.raises(ConfigError, match="another format"):
        fa.merge(
            model,
            params,
            method,
            to=to if name == "dense" and "int8" in to else "bfloat16",
            undo=True,
        )


# Refusals.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@methods
def test_nan_or_inf_in_the_adapter_is_refused(kind, bad):
    model, method = model_of("int8-row"), METHODS[kind]
    params = adapter_of(model, method)
    for field in params["2"]._fields:
        leaf = getattr(params["2"], field).clone()
        leaf.view(-1)[0] = bad
        broken = params | {"2": params["2"]._replace(**{field: leaf})}
        with pytest.raises(AdapterError, match=rf"'2'.*{field}.* holds 1 NaN or Inf"):
            assert_pure_raises(model, broken, method)


def assert_pure_raises(model, params, method):
    caught: list[Exception] = []

    def call():
        try:
            fa.merge(model, params, method)
        except Exception as error:
            caught.append(error)

    assert_pure(call, model, params)
    if caught:
        raise caught[0]


@pytest.mark.parametrize("name", ["dense", "int8-row", "int8-tensor"])
def test_a_result_that_is_not_finite_is_refused(name):
    model, method = model_of(name), fa.LoRA(rank=2, alpha=2)
    params = adapter_of(model, method)
    huge = params["0"]._replace(lora_A=torch.full((2, 16), 1e30), lora_B=torch.full((12, 2), 1e30))
    with pytest.raises(MergeError, match=r"'0'.*(NaN or Inf|overflows)"):
        fa.merge(model, params | {"0": huge}, method)
    assert fa.merge(model, params | {"0": huge}, method, safe=False)


@pytest.mark.parametrize("name", ["dense", "int8-row", "int8-tensor"])
def test_an_adapter_fresh_from_training_is_merged_as_a_constant(name):
    """Its leaves want gradients: no merged tensor does, nor is W kept for one."""
    model, moments = model_of(name), {"0": torch.eye(16), "2": torch.eye(12)}
    for kind, method in METHODS.items():
        params = adapter_of(model, method)
        leaves = tree_map(lambda t: t.clone().requires_grad_(), params)
        roundings = ["nearest", "search", *["feedback"] * (kind == "lora")]
        for rounding in roundings:
            told = {"rounding": rounding, "moments": moments}
            state, undo = fa.merge(model, leaves, method, undo=True, **told)
            want = fa.merge(model, params, method, **told)
            assert all(same_bytes(state[n], want[n]) for n in want)
            held = [*state.values(), *tree_leaves(undo)]
            held += [scales(t) for t in state.values() if hasattr(t, "__tensor_flatten__")]
            assert not any(t.requires_grad for t in held)
        merged, undo = fa.merged_model(model, leaves, method, undo=True)
        back = fa.unmerge(merged, leaves, method, undo=undo)
        assert all(same_bytes(back[n], p) for n, p in model.named_parameters() if n in back)
        x = torch.ones(2, 16)
        for transform in (
            lambda f: torch.func.grad(lambda p: f(p).sum())(params),
            lambda f: torch.func.vmap(f)(fa.stack([params, params])),
            lambda f: torch.func.jvp(f, (params,), (params,)),
        ):
            with pytest.raises(MergeError, match="not differentiated or mapped"):
                transform(lambda p: functional_call(model, fa.merge(model, p, method), (x,)))


def test_what_a_later_layer_lacks_is_told_before_the_first_is_merged():
    model, method, seen = model_of("int8-row"), METHODS["lora"], []
    params = adapter_of(model, method)
    told = {"progress": lambda *a: seen.append(a)}
    first, last = torch.eye(16), torch.eye(12)
    for moments in ({"0": first}, {"0": first, "2": first}):
        for rounding in ("search", "feedback"):
            with pytest.raises(AdapterError, match=r"'2' needs X\^T X of shape \[12, 12\]"):
                fa.merge(model, params, method, rounding=rounding, moments=moments, **told)
    with pytest.raises(AdapterError, match=r"'2' rounds its inputs"):
        fa.merged_model(model, params, method, to="inc-fp8", amax={"0": 1.0}, **told)
    assert not seen
    fa.merge(model, params, method, rounding="feedback", moments={"0": first, "2": last}, **told)
    assert len(seen) == 2


def test_an_overflow_of_float16_is_refused():
    model, method = model_of("dense", dtype=torch.float16), fa.LoRA(rank=2, alpha=2)
    params = adapter_of(model, method)
    big = params["0"]._replace(lora_A=torch.full((2, 16), 300.0), lora_B=torch.full((12, 2), 300.0))
    with pytest.raises(MergeError, match=r"overflows torch.float16"):
        fa.merge(model, params | {"0": big}, method)
    merged = fa.merged_model(model, params | {"0": big}, method, to="float32")
    assert bool(merged[0].weight.isfinite().all())


def test_paths_shapes_and_stacks_that_do_not_fit_are_refused():
    model, method = model_of("int8-row"), METHODS["lora"]
    params = adapter_of(model, method)
    with pytest.raises(AdapterError, match="paths"):
        fa.merge(model, {"0": params["0"]}, method)
    with pytest.raises(AdapterError, match="paths"):
        fa.merge(model, params | {"9": params["0"]}, method)
    with pytest.raises(AdapterError, match=r"'0'.*lora_A"):
        fa.merge(model, params | {"0": params["2"]}, method)
    with pytest.raises(AdapterError, match=r"an adapter \{path: ...\}, got a Tensor"):
        fa.merge(model, [torch.ones(1)], method)
    with pytest.raises(AdapterError, match="stack"):
        fa.merge(model, fa.stack([params, params]), method)
    with pytest.raises(AdapterError, match="OFTParams"):
        fa.merge(model, params, METHODS["oft"])
    with pytest.raises(ConfigError, match="methods"):
        fa.merge(model, [params, params], [method])
    with pytest.raises(ConfigError, match="scales"):
        fa.merge(model, params, method, scales="new")
    with pytest.raises(ConfigError, match="rounding"):
        fa.merge(model, params, method, rounding="up")
    with pytest.raises(ConfigError, match="generator"):
        fa.merge(model, params, method, rounding="stochastic")
    with pytest.raises(ConfigError, match="calibrate"):
        fa.merge(model, params, method, rounding="feedback")
    with pytest.raises(ConfigError, match="no such format"):
        fa.merge(model, params, method, to="int9")


def test_a_record_of_another_merge_is_refused():
    model, method = model_of("int8-row"), METHODS["lora"]
    one, two = adapter_of(model, method, 0.3, 1), adapter_of(model, method, 0.3, 2)
    merged, undo = fa.merged_model(model, one, method, undo=True)
    with pytest.raises(AdapterError, match="does not give back"):
        fa.unmerge(merged, two, method, undo=undo)
    broken = {"0": undo["0"] | {"codes": undo["0"]["codes"] ^ 1}} | {"2": undo["2"]}
    with pytest.raises(AdapterError, match="does not give back"):
        fa.unmerge(merged, one, method, undo=broken)
    with pytest.raises(MergeError, match="other layers"):
        fa.unmerge(merged, one, method, undo={"0": undo["0"]})


def test_tied_weights_are_refused_by_merge_and_untied_by_merged_model():
    model = model_of("dense", 8, 8)
    model[2].weight = model[0].weight
    method = fa.LoRA(rank=2, targets=["2"])
    params = adapter_of(model, method)
    with pytest.raises(MergeError, match=r"'2' shares its weight with '0'"):
        fa.merge(model, params, method)
    merged = fa.merged_model(model, params, method)
    assert torch.equal(merged[0].weight, model[0].weight)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    # One product and one sum in float32, in another order.
    assert torch.allclose(merged(x), fa.bind(model, method)(params, x), atol=1e-6)


def test_modules_saved_whole_are_replaced_and_cannot_be_unmerged():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    method = fa.LoRA(rank=2, targets=["0"], modules_to_save=["1"])
    params = adapter_of(model, method)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    want = fa.bind(model, method)(params, x)
    state = fa.merge(model, params, method)
    assert torch.allclose(functional_call(model, state, (x,)), want, atol=1e-5)
    merged = fa.merged_model(model, params, method)
    assert torch.allclose(merged(x), want, atol=1e-5)
    with pytest.raises(MergeError, match="whole"):
        fa.unmerge(merged, params, method)


# Roundings.


def test_stochastic_rounding_keeps_a_delta_far_below_a_step_on_average():
    model, method = model_of("int8-row", 16, 64), fa.LoRA(rank=1, alpha=1, targets=["0"])
    base = fa.base_of(model[0])
    params = {
        "0": fa.LoRAParams(torch.ones(1, 16), 0.1 * base.scale.clone())
    }  # a tenth of a step everywhere
    before = base.qdata.clone()
    same = fa.merge(model, params, method)["0.weight"].qdata
    assert torch.equal(same, before)  # plain rounding loses it whole
    g = torch.Generator().manual_seed(0)
    runs = [
        fa.merge(model, params, method, rounding="stochastic", generator=g, scales="keep")
        for _ in range(40)
    ]
    moved = torch.stack([r["0.weight"].qdata.float() - before for r in runs])
    inside = before < 127
    # 40 x about 1000 draws of probability 0.1: the mean's standard deviation is 0.0015.
    assert abs(float(moved[:, inside].mean()) - 0.1) < 0.006
    assert set(moved.unique().tolist()) <= {0.0, 1.0}


def test_search_never_errs_more_than_the_scales_it_starts_from():
    for name in ("int8-row", "int8-tensor", "int8-group"):
        model, method = model_of(name), METHODS["lora"]
        params = adapter_of(model, method, 0.3)
        errors = {}
        for rounding in ("nearest", "search"):
            merged = fa.merged_model(model, params, method, rounding=rounding)
            errors[rounding] = sum(
                float(
                    (fa.base_of(merged.get_submodule(p)).dequantize().double() - W).square().sum()
                )
                for p, W in wanted(model, params, method).items()
            )
        assert errors["search"] <= errors["nearest"] * (1 + 1e-6)


@pytest.mark.parametrize("name", ["int8-row", "int8-tensor", "int8-group"])
def test_feedback_lowers_the_error_of_the_outputs(name):
    model, method = model_of(name, 32, 24), METHODS["lora"]
    params = adapter_of(model, method, 0.1)
    g = torch.Generator().manual_seed(3)
    # Inputs that lie near a plane of 6 dimensions, as real activations do.
    x = torch.randn(256, 6, generator=g) @ torch.randn(6, 32, generator=g)
    x = x + 0.05 * torch.randn(256, 32, generator=g)
    moments = assert_pure(lambda: fa.calibrate(model, params, method, [x]), model, params, x)
    torch.testing.assert_close(moments["0"], x.T @ x)
    W, out = wanted(model, params, method)["0"], {}
    for rounding in ("nearest", "feedback"):
        state = fa.merge(model, params, method, rounding=rounding, moments=moments)
        V = state["0.weight"].dequantize().double()
        out[rounding] = float((x.double() @ (W - V).T).norm())
    assert out["feedback"] < 0.8 * out["nearest"]


def test_roundings_are_compared_on_the_same_case():
    model, method = model_of("int8-row", 32, 24), METHODS["lora"]
    params = adapter_of(model, method, 0.02)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(256, 6, generator=g) @ torch.randn(6, 32, generator=g)
    moments = fa.calibrate(model, params, method, [x])

    def report(rounding):
        g = torch.Generator().manual_seed(0)
        return fa.merge_report(
            model, params, method, rounding=rounding, moments=moments, generator=g
        )

    names = ["nearest", "search", "feedback", "stochastic"]
    found = assert_pure(lambda: report(names), model, params, moments)
    assert list(found.reports) == names
    assert all(found.reports[name] == report(name) for name in names)
    errors = {n: found.reports[n].layers["0"].output.error for n in names}
    assert found.best["0"] == min(errors, key=errors.get) == "feedback"
    first, *lines = str(found).splitlines()
    assert first.split() == ["layer", "dropped", *names, "best"]
    assert lines[0].split()[-1] == "feedback"
    assert f"{errors['search']:.3%}" in lines[0]
    # What one of them lacks is told before the others are measured.
    seen: list[Any] = []
    for rounding, words in (
        (["nearest", "stochastic"], "generator"),
        (["nearest", "feedback"], "calibrate"),
        (["nearest", "up"], "must be one of"),
        ([], "at least one"),
    ):
        with pytest.raises(ConfigError, match=words):
            fa.merge_report(
                model, params, method, rounding=rounding, progress=lambda *a: seen.append(a)
            )
    assert not seen


def test_progress_is_told_before_each_layer():
    model, method, seen = model_of("int8-row"), METHODS["lora"], []
    fa.merge(model, adapter_of(model, method), method, progress=lambda *a: seen.append(a))
    assert seen == [("0", 0, 2), ("2", 1, 2)]


def test_undo_records_are_small_and_plain_tensors():
    model, method = model_of("int8-row", 256, 256), fa.LoRA(rank=4, targets=["0"])
    params = adapter_of(model, method, 0.01)
    _, undo = fa.merge(model, params, method, undo=True)
    leaves = tree_leaves(undo)
    assert all(type(t) is torch.Tensor for t in leaves)
    # 64 KiB of codes and 1 KiB of scales: a row in which the widest element grew is rounded anew.
    assert sum(t.numel() * t.element_size() for t in leaves) < 256 * 256 / 5
