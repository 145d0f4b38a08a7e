"""Stacks: equal adapters, ragged ones, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fadapt as fa


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def randomized(params, seed):
    g = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=t.dtype), params)


def make(model, method, seed):
    g = torch.Generator().manual_seed(seed)
    return randomized(fa.init(method, model, generator=g), seed)


def same(a, b) -> bool:
    if list(a) != list(b):
        return False
    return all(map(torch.equal, tree_leaves(a), tree_leaves(b)))


def test_unstack_inverts_stack():
    model, method = net(), fa.LoRA(rank=2)
    adapters = [make(model, method, s) for s in range(3)]
    many = fa.stack(adapters)
    assert many["0"].lora_A.shape == (3, 2, 6)
    assert all(same(a, b) for a, b in zip(fa.unstack(many), adapters, strict=True))


METHODS = st.builds(
    fa.LoRA,
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.3, 1.0, 3.0, 16.0]),
    targets=st.sampled_from([["0"], ["2"], ["0", "2"], "all-linear"]),
    rslora=st.booleans(),
    lora_bias=st.booleans(),
)


@given(methods=st.lists(METHODS, min_size=1, max_size=4), fold=st.booleans())
@settings(max_examples=40, deadline=None)
def test_ragged_stacks_run_and_come_apart(methods, fold):
    model = net()
    adapters = [make(model, m, s) for s, m in enumerate(methods)]
    many, unit = fa.stack(adapters, methods=methods, fold=fold)
    back = fa.unstack(many, unit)
    for one, adapter in zip(back, adapters, strict=True):
        assert list(one) == list(adapter)
        for a, b in zip(tree_leaves(one), tree_leaves(adapter), strict=True):
            if fold:  # a product and a quotient, each rounded by half an eps
                torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=0)
            else:
                assert torch.equal(a, b)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    forward = fa.bind(model, unit)
    if fold:
        ys = vmap(forward, in_dims=(0, None))(many, x)
    else:
        scaled = vmap(lambda p, s: forward(fa.scale_by(p, s), x))
        ys = scaled(many, unit.scalings(tree_leaves(many)[0]))
    for y, adapter, method in zip(ys, adapters, methods, strict=True):
        # float64 sums of at most 8 products, and a scaling rounded once more
        torch.testing.assert_close(y, fa.bind(model, method)(adapter, x), rtol=1e-12, atol=1e-12)


def test_power_of_two_scalings_fold_without_loss():
    model = net()
    methods = [fa.LoRA(rank=2, alpha=4), fa.LoRA(rank=4, alpha=1), fa.LoRA(rank=1, targets=["2"])]
    adapters = [make(model, m, s) for s, m in enumerate(methods)]
    many, unit = fa.stack(adapters, methods=methods)
    assert all(same(a, b) for a, b in zip(fa.unstack(many, unit), adapters, strict=True))


def test_training_an_unfolded_stack_is_training_each_alone_and_keeps_padding_zero():
    model = net()
    methods = [
        fa.LoRA(rank=2, alpha=6),
        fa.LoRA(rank=3, alpha=1, targets=["0"]),
        fa.LoRA(rank=1, rank_pattern={"2": 4}),
    ]
    adapters = [make(model, m, s) for s, m in enumerate(methods)]
    many, unit = fa.stack(adapters, methods=methods, fold=False)
    forward, scalings = fa.bind(model, unit), unit.scalings(tree_leaves(many)[0])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def step(params, loss):
        return tree_map(lambda p, g: p - 0.1 * g, params, grad(loss)(params))

    for _ in range(3):
        many = vmap(lambda p, s: step(p, lambda p: forward(fa.scale_by(p, s), x).square().mean()))(
            many, scalings
        )
    for one, adapter, method in zip(fa.unstack(many, unit), adapters, methods, strict=True):
        alone = fa.bind(model, method)
        for _ in range(3):
            adapter = step(adapter, lambda p, f=alone: f(p, x).square().mean())
        torch.testing.assert_close(one, dict(adapter), rtol=1e-10, atol=1e-12)  # float64, 3 steps
    assert not many["2"].lora_A[1].any()  # a layer that the second adapter lacks
    assert not many["0"].lora_B[0, :, 2:].any()  # ranks that the first lacks


def test_fold_is_differentiable_and_right():
    model, method = net(), fa.LoRA(rank=2, alpha=3, alpha_pattern={"0": 7.0})
    params = make(model, method, 0)
    x = torch.ones(2, 6, dtype=torch.float64)
    unit = fa.LoRA(rank=2, alpha=2)
    folded = fa.bind(model, unit)(fa.fold(params, method), x)
    torch.testing.assert_close(folded, fa.bind(model, method)(params, x))
    a = grad(lambda p: fa.bind(model, unit)(fa.fold(p, method), x).sum())(params)
    b = grad(lambda p: fa.bind(model, method)(p, x).sum())(params)
    torch.testing.assert_close(a, b)


def test_saved_modules_ride_along():
    model = net()
    methods = [fa.LoRA(rank=r, targets=["0"], modules_to_save=["2"]) for r in (1, 2)]
    adapters = [make(model, m, s) for s, m in enumerate(methods)]
    many, unit = fa.stack(adapters, methods=methods)
    x = torch.ones(2, 6, dtype=torch.float64)
    ys = vmap(fa.bind(model, unit), in_dims=(0, None))(many, x)
    for y, a, m in zip(ys, adapters, methods, strict=True):
        torch.testing.assert_close(y, fa.bind(model, m)(a, x))
    with pytest.raises(fa.errors.AdapterError, match=r"modules_to_save \['2'\]"):
        fa.stack(
            [adapters[0], make(model, fa.LoRA(rank=1, targets=["0"]), 0)],
            methods=[methods[0], fa.LoRA(rank=1, targets=["0"])],
        )


@pytest.mark.parametrize(
    ("make_call", "error", "match"),
    [
        (lambda a, b: fa.stack([]), "AdapterError", "no adapters"),
        (lambda a, b: fa.stack([a, b]), "AdapterError", r"methods=\[\.\.\.\]"),
        (lambda a, b: fa.stack([a], methods=[]), "AdapterError", "1 adapters and 0 methods"),
        (lambda a, b: fa.stack([a], methods=[fa.LoRA(rank=3)]), "AdapterError", "rank 3"),
        (
            lambda a, b: fa.stack([a, a], methods=[fa.LoRA(rank=2), fa.LoRA(rank=2, dropout=0.1)]),
            "ConfigError",
            "one dropout",
        ),
        (lambda a, b: fa.unstack({"0": a["0"], "2": b["2"]}), "AdapterError", "not a stack"),
    ],
)
def test_errors(make_call, error, match):
    model = net()
    a, b = make(model, fa.LoRA(rank=2), 0), make(model, fa.LoRA(rank=3), 1)
    with pytest.raises(getattr(fa.errors, error), match=match):
        make_call(a, b)
