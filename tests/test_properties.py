"""The laws once more, over models, methods and adapters that hypothesis draws."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization import quantize_
from torchao_int8 import dynamic, weight_only
from transforms import plain_grads

import fadapt as fa
import fadapt.testing as ft

CONFIGS = {
    "int8": weight_only(),
    "dynamic": dynamic(),
}
few = settings(max_examples=40, deadline=None)


@st.composite
def frozen(draw, *bases) -> nn.Module:
    base = draw(st.sampled_from(bases or ("dense", "int8", "dynamic")))
    kind = torch.float64 if base == "dense" else torch.float32
    least = 1 if base == "dense" else 2  # torchao quantizes no weight of one column
    model = draw(ft.models(ft.dtypes(kind), sizes=st.integers(least, 8)))
    if base != "dense":
        quantize_(model, CONFIGS[base])
    return model


def eps_of(model):
    # Up to eight layers, each a sum of eight products: some hundred roundings.
    return 256 * torch.finfo(next(model.parameters()).dtype).eps


def close(got, want, eps):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= eps * (1 + b.abs().max())


def loss(forward):
    return lambda p, x: forward(p, x).square().mean()


@given(data=st.data(), model=frozen())
@few
def test_without_an_adapter_and_with_a_fresh_one_it_is_the_model(data, model):
    method, x = data.draw(ft.methods(model)), data.draw(ft.inputs(model))
    fresh = data.draw(ft.adapters(model, method, fresh=True))
    forward = ft.assert_pure(lambda: fa.bind(model, method), model)
    with torch.no_grad():
        want = model(x)
    assert torch.equal(ft.assert_pure(lambda: forward(None, x), model, forward, x), want)
    got = ft.assert_pure(lambda: forward(fresh, x), model, forward, fresh, x)
    if getattr(method, "init", "") == "orthogonal":  # B A = 0 up to float32's rounding
        if not has_rounding(model):
            close(got, want, 256 * torch.finfo(torch.float32).eps)
    else:
        assert torch.equal(got, want)


def has_rounding(model):
    """Whether an activation is rounded, so that the last bit before may be a whole step after."""
    weight = model.inlet.weight
    return getattr(weight, "act_quant_kwargs", None) is not None


@given(data=st.data(), model=frozen("dense", "int8"))
@few
def test_a_stack_is_its_adapters(data, model):
    method, x = data.draw(ft.methods(model)), data.draw(ft.inputs(model))
    adapters = [data.draw(ft.adapters(model, method)) for _ in range(data.draw(st.integers(1, 3)))]
    many = fa.stack(adapters)
    for one, adapter in zip(fa.unstack(many), adapters, strict=True):
        assert one.keys() == adapter.keys()
        assert all(map(torch.equal, tree_leaves(one), tree_leaves(adapter)))
    forward, eps = fa.bind(model, method), eps_of(model)
    ys = vmap(forward, in_dims=(0, None))(many, x)
    close(ys, torch.stack([forward(p, x) for p in adapters]), eps)
    want = [plain_grads(loss(forward), p, x)[0] for p in adapters]
    for got in (
        vmap(grad(loss(forward)), in_dims=(0, None))(many, x),
        grad(lambda m: vmap(loss(forward), in_dims=(0, None))(m, x).sum())(many),
        fa.value_and_grad(loss(forward), in_dims=(0, None))(many, x)[1],
    ):
        for one, single in zip(fa.unstack(got), want, strict=True):
            close(one, single, eps)


@given(data=st.data(), model=frozen())
@few
def test_forward_and_reverse_mode_are_adjoint(data, model):
    # <u, J v> = <J^T u, v>, for a jvp and a vjp that share no code below torch's own formulas.
    method, x = data.draw(ft.methods(model)), data.draw(ft.inputs(model))
    params, move = (data.draw(ft.adapters(model, method)) for _ in range(2))
    forward, g = fa.bind(model, method), data.draw(ft.generators())
    step = torch.randn(x.shape, generator=g).to(x)
    y, ahead = jvp(forward, (params, x), (move, step))
    u = torch.randn(y.shape, generator=g).to(y)
    back = vjp(forward, params, x)[1](u)
    terms = [
        (a * b).flatten() for a, b in zip(*map(tree_leaves, (back, (move, step))), strict=True)
    ]
    products = torch.cat([*terms, (u * ahead).flatten()])
    difference = (u * ahead).sum() - sum(t.sum() for t in terms)
    # Sums of terms of both signs: relative to the sum of their sizes.
    assert difference.abs() <= eps_of(model) * (1e-3 + products.abs().sum())


@given(data=st.data(), model=frozen("dense"))
@few
def test_the_slope_is_that_of_the_outputs(data, model):
    # Central differences in float64; DoRA's norm is a constant to its derivatives by definition.
    method = data.draw(ft.methods(model, [fa.LoRA, fa.OFT]))
    params, move = (data.draw(ft.adapters(model, method)) for _ in range(2))
    forward, x = fa.bind(model, method), data.draw(ft.inputs(model))
    _, slope = jvp(lambda p: forward(p, x), (params,), (move,))

    def difference(h: float) -> torch.Tensor:
        moved = (tree_map(lambda a, b, s=s: a + s * b, params, move) for s in (h, -h))
        ahead, behind = (forward(p, x) for p in moved)
        return (ahead - behind) / (2 * h)

    wide, near = difference(2e-5), difference(1e-5)
    # Halving h leaves a fourth of its error: a third of the change is left in `near`, and here
    # taken off. Then h**4 of a higher derivative remains, less than that third; and eps / h.
    want, step = near + (near - wide) / 3, (near - wide).abs().max()
    size = 1 + want.abs().max() + forward(params, x).abs().max()
    assert (slope - want).abs().max() <= step / 3 + 1e-7 * size
