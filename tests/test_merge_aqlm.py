"""Merging into AQLM: the refusal, what re-encoding keeps, the remainder, the report."""

import copy

import pytest
import torch
from aqlm import QuantizedLinear
from aqlm_layers import quantized, used
from torch import nn
from torchao.quantization import Int8Tensor

import fadapt as fa
from fadapt.bases.aqlm import aqlm_layer
from fadapt.bases.aqlm_fresh import encode
from fadapt.errors import AdapterError, ConfigError, MergeError, UnsupportedLayerError
from fadapt.testing import assert_pure

N = 64
METHOD = fa.LoRA(rank=4, targets=["0"])


def weight() -> torch.Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(0)) / 8


def model_of(nbits: int = 6) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    base = encode(
        weight(), torch.randn(N, generator=g), nbits_per_codebook=nbits, rounds=1, generator=g
    )
    return nn.Sequential(aqlm_layer(base))


def adapter(relative: float) -> dict[str, fa.LoRAParams]:
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, N, generator=g), torch.randn(N, 4, generator=g)
    return {"0": fa.LoRAParams(A, B * (relative * weight().norm() / (B @ A).norm()))}


def inputs(rows: int = 512) -> torch.Tensor:
    """Near a space of 8 dimensions, as activations are."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 8, generator=g) @ torch.randn(8, N, generator=g)
    return x + 0.1 * torch.randn(rows, N, generator=g)


def test_it_is_refused_with_the_share_that_would_survive():
    model, params = model_of(), adapter(0.05)
    with pytest.raises(MergeError, match=r"'0' is AQLM.*would keep 0% of.*Recode"):
        fa.merge(model, params, METHOD)
    with pytest.raises(MergeError, match="AQLM"):
        fa.merged_model(model, params, METHOD)
    mixed, seen = nn.Sequential(nn.Linear(N, N), model[0]), []  # before the layer ahead of it
    both = fa.LoRA(rank=4, targets=["0", "1"])
    pair = {"0": params["0"], "1": params["0"]}
    with pytest.raises(MergeError, match=r"'1' is AQLM"):
        fa.merge(mixed, pair, both, progress=lambda *a: seen.append(a))
    assert not seen
    nothing = {"0": params["0"]._replace(lora_B=torch.zeros(N, 4))}
    state = fa.merge(model, nothing, METHOD)
    assert all(torch.equal(state[f"0.{n}"], p) for n, p in model[0].named_parameters())


@pytest.mark.parametrize("calibrated", [False, True])
def test_re_encoding_is_never_worse_than_dropping_and_calibration_helps(calibrated):
    model, params, x = model_of(), adapter(0.05), inputs()
    moments = fa.calibrate(model, params, METHOD, [x]) if calibrated else None
    how = fa.Recode(rounds=2)
    report = assert_pure(
        lambda: fa.merge_report(model, params, METHOD, moments=moments, aqlm=how), model, params
    )
    one = report.layers["0"]
    found = one.output or one.weight
    assert found.error < found.delta
    assert report.lost == []
    assert one.format == "Aqlm"
    if calibrated:
        # Measured 0.8; with distances in W alone 0.1. Half is far from either.
        assert found.captured > 0.5
        merged = fa.merged_model(model, params, METHOD, moments=moments, aqlm=how)
        assert type(merged[0]) is QuantizedLinear
        with torch.no_grad():
            y = merged(x)
        base = fa.base_of(merged[0])
        # AQLM's own layer runs it: 64 products in float32, in another order.
        torch.testing.assert_close(y, base.linear(x), rtol=1e-4, atol=1e-4)
        want, dropped = fa.bind(model, METHOD)(params, x), fa.bind(model, METHOD)(None, x)
        assert float((y - want).norm()) < 0.7 * float((dropped - want).norm())


def test_from_the_original_weight_the_base_error_is_not_added_twice():
    model, params, x = model_of(), adapter(0.3), inputs()
    original = {"0": weight()}
    how = fa.Recode(rounds=2, original=original)
    moments = fa.calibrate(model, params, METHOD, [x])
    report = fa.merge_report(model, params, METHOD, moments=moments, original=original, aqlm=how)
    truth = report.layers["0"].truth
    assert truth is not None
    assert report.layers["0"].base_error > 0
    # Fitted to W0 + ΔW itself, in the norm that is measured here: better than the base with the
    # adapter beside it, whose error is that of the base; far better than the adapter dropped.
    assert truth.merged < truth.unmerged < truth.dropped
    assert "Aqlm" in str(report)
    with pytest.raises(AdapterError, match=r"original.*\[64, 64\]"):
        fa.merge(model, params, METHOD, aqlm=fa.Recode(original={}))


def test_the_exact_way_back_and_a_layer_that_has_run():
    model, params = model_of(8), adapter(0.3)
    old = copy.deepcopy(dict(model[0].named_parameters()))
    merged, undo = fa.merged_model(model, params, METHOD, aqlm=fa.Recode(rounds=1), undo=True)
    assert not torch.equal(merged[0].codebooks, old["codebooks"])
    back = fa.unmerge(merged, params, METHOD, undo=undo)
    assert all(torch.equal(back[f"0.{n}"], p) for n, p in old.items())
    used(merged[0])  # permutes its codes in place
    again = fa.unmerge(merged, params, METHOD, undo=undo)
    assert all(torch.equal(again[f"0.{n}"], old[n]) for n in ("codebooks", "scales", "bias"))
    assert torch.equal(again["0.codes"], old["codes"].transpose(0, 1))
    with pytest.raises(MergeError, match="undo"):
        fa.unmerge(merged, params, METHOD)


def test_time_is_limited_and_progress_is_told():
    model, params, seen = model_of(), adapter(0.3), []
    how = fa.Recode(rounds=3, progress=lambda *a: seen.append(a))
    fa.merge(model, params, METHOD, aqlm=how)
    assert [a[:3] for a in seen] == [("0", k, 3) for k in range(4)]
    assert [a[3] for a in seen] == sorted((a[3] for a in seen), reverse=True)
    seen.clear()
    fa.merge(model, params, METHOD, aqlm=fa.Recode(rounds=3, seconds=0.0, progress=how.progress))
    assert len(seen) == 1
    with pytest.raises(ConfigError, match="beam"):
        fa.Recode(beam=0)


def test_a_remainder_of_the_adapters_rank_loses_nothing():
    model, params, x = model_of(), adapter(0.05), inputs(16)
    want = fa.bind(model, METHOD)(params, x)
    state, rest, method = assert_pure(
        lambda: fa.merge_with_remainder(model, params, METHOD, rank=4), model, params
    )
    assert state == {}  # the codes are the base's own
    got = fa.bind(model, method, state=state)(rest, x)
    # Rounded to float32 once on the way through the singular vectors.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    moments = fa.calibrate(model, params, METHOD, [x])
    errors = []
    for rank in (1, 2, 3):
        state, rest, method = fa.merge_with_remainder(model, params, METHOD, rank, moments=moments)
        got = fa.bind(model, method, state=state)(rest, x)
        errors.append(float((got - want).norm()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ConfigError, match="rank"):
        fa.merge_with_remainder(model, params, METHOD, 0)


def test_into_int8_from_aqlm():
    model, params = model_of(), adapter(0.3)
    merged = assert_pure(lambda: fa.merged_model(model, params, METHOD, to="int8"), model, params)
    assert type(merged[0]) is nn.Linear
    assert type(merged[0].weight) is Int8Tensor
    target = fa.base_of(model[0]).dequantize() + params["0"].lora_B @ params["0"].lora_A
    error = (merged[0].weight.dequantize() - target).abs()
    slack = 8 * torch.finfo(torch.float32).eps * target.abs().amax()
    assert bool((error <= merged[0].weight.scale / 2 * (1 + 1e-5) + slack).all())
    with pytest.raises(MergeError, match="merged_model"):
        fa.merge(model, params, METHOD, to="int8")


def test_fine_tuning_brings_the_outputs_closer_and_keeps_the_codes():
    model = nn.Sequential(*model_of(), nn.Tanh(), *model_of())
    method = fa.LoRA(rank=4, targets=["0", "2"])
    params = {"0": adapter(0.3)["0"], "2": adapter(0.3)["0"]}
    merged = fa.merged_model(model, params, method, aqlm=fa.Recode(rounds=1))
    forward, seen = fa.bind(model, method), []
    xs = list(inputs(256).split(64))
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()  # its first use makes loggers
    new = assert_pure(
        lambda: fa.finetune_aqlm(
            merged,
            lambda x: forward(params, x),
            xs,
            steps=40,
            lr=3e-3,
            progress=lambda *a: seen.append(a),
        ),
        merged,
        model,
        params,
        xs,
    )
    assert [a[:3] for a in seen] == [("tuning", k, 40) for k in range(40)]
    x = torch.cat(xs)
    want = forward(params, x)
    with torch.no_grad():
        before, after = ((m(x) - want).norm() / want.norm() for m in (merged, new))
    assert after < 0.8 * before  # measured 0.5
    for path in ("0", "2"):
        old, now = (fa.base_of(m.get_submodule(path)) for m in (merged, new))
        assert type(new.get_submodule(path)) is QuantizedLinear
        assert torch.equal(now.codes, old.codes)
        assert not torch.equal(now.codebooks, old.codebooks)
    # Steps that do not help, or no time: the layers as they were.
    for options in ({"lr": 50.0, "steps": 3}, {"seconds": -1.0}):
        same = fa.finetune_aqlm(merged, lambda x: forward(params, x), xs, **options)
        assert torch.equal(same[0].codebooks, merged[0].codebooks)
    for wrong, words in (({"steps": 0}, "steps"), ({"batches": []}, "no batch")):
        with pytest.raises(ConfigError, match=words):
            fa.finetune_aqlm(merged, forward, **({"batches": xs} | wrong))
    with pytest.raises(UnsupportedLayerError, match="no AQLM layer"):
        fa.finetune_aqlm(nn.Linear(2, 2), forward, xs)


def test_a_layer_of_two_names_is_tuned_as_one():
    layer = quantized((2, 6, 8, 1), 16, 16, bias=False).requires_grad_(False)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.ones(2, 16)
    tuned = fa.finetune_aqlm(model, lambda x: 0.9 * model(x).detach(), [x], steps=5)
    assert tuned[0] is tuned[2]
    assert not torch.equal(tuned[2].codebooks, layer.codebooks)


def test_what_a_model_writes_to_while_it_is_tuned_stays():
    layer = quantized((2, 6, 8, 1), 16, 16, bias=False).requires_grad_(False)
    model = nn.Sequential(layer, nn.BatchNorm1d(16)).train().requires_grad_(False)
    teacher, x = fa.bind(model, fa.LoRA(rank=1, targets=["0"])), inputs(8)[:, :16]
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()  # its first use makes loggers
    assert_pure(lambda: fa.finetune_aqlm(model, lambda x: teacher(None, x), [x], steps=2), model, x)


def test_tuned_layers_are_measured_as_they_are_kept():
    """A step below what bfloat16 holds: in float32 the loss falls, and rounded it may rise."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        layer = quantized((2, 6, 8, 1), dtype=torch.bfloat16, bias=False).requires_grad_(False)
        xs = [torch.randn(8, 64, generator=g) for _ in range(3)]
        weight = fa.base_of(layer).dequantize(torch.float32)
        wanted = weight * (1 + 1e-3 * torch.randn(weight.shape, generator=g))

        def loss(found, xs=xs, wanted=wanted):
            off = fa.base_of(found).dequantize(torch.float32) - wanted
            each = [(x @ off.T).square().sum() / (x @ wanted.T).square().sum() for x in xs]
            return float(sum(each))

        tuned = fa.finetune_aqlm(layer, lambda x, w=wanted: x @ w.T, xs, steps=1, lr=5e-5)
        assert loss(tuned) <= loss(layer) * (1 + 1e-5)  # the sums are of float32


def test_a_search_out_of_time_keeps_what_it_has():
    model, params, x = model_of(), adapter(0.3), inputs()
    moments = fa.calibrate(model, params, METHOD, [x])
    for options in ({}, {"moments": moments}):
        state = fa.merge(model, params, METHOD, aqlm=fa.Recode(seconds=0.0), **options)
        assert torch.equal(state["0.codes"], fa.base_of(model[0]).codes)
    # From nothing: what k-means drew.
    merged = fa.merged_model(
        model,
        params,
        METHOD,
        to="aqlm-2x6",
        generator=torch.Generator().manual_seed(0),
        aqlm=fa.Recode(seconds=0.0),
    )
    assert merged[0].codes.shape == model[0].codes.shape


def test_a_result_that_is_not_finite_is_refused():
    huge = {"0": fa.LoRAParams(torch.full((4, N), 1e30), torch.full((N, 4), 1e30))}
    g = torch.Generator().manual_seed(0)
    for options in ({"aqlm": fa.Recode(rounds=0)}, {"to": "aqlm-2x4", "generator": g}):
        with pytest.raises(MergeError, match=r"'0'.*NaN or Inf"):
            fa.merged_model(model_of(), huge, METHOD, **options)
