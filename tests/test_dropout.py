"""Dropout: a pure function of a seed, or of masks; another mask for each layer and each adapter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import fadapt as fa
import fadapt.testing as ft
from fadapt.errors import AdapterError, ConfigError
from fadapt.random import keep_mask

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(p=0.5, seed=0):
    g = seeded(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    method = fa.LoRA(rank=2, alpha=4, dropout=p)
    fresh = fa.init(method, model, generator=g)
    params = tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=F64), fresh)
    return model, method, params, torch.randn(5, 8, generator=g, dtype=F64)


def by_hand(model, method, params, x, masks):
    """W x + b + s B A (mask x) / (1 - p), in plain torch."""
    for path in ("0", "2"):
        layer, p = model[int(path)], params[path]
        h = x * masks[path] / (1 - method.dropout)
        x = layer(x) + method.scaling * h @ p.lora_A.mT @ p.lora_B.mT
        x = torch.tanh(x) if path == "0" else x
    return x


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64, sums in another order


def masks_of(forward, seed, x):
    """The masks that a seed gives."""
    return {
        path: keep_mask(seed + layer.stream, torch.Size((len(x), 8)), 0.5)
        for path, layer in forward.layers.items()
    }


def test_masks_do_what_the_paper_says():
    model, method, params, x = case()
    forward = fa.bind(model, method)
    masks = {path: torch.rand(5, 8, generator=seeded(1)) > 0.5 for path in forward.layers}
    got = ft.assert_pure(lambda: forward(params, x, dropout=masks), model, forward, params, masks)
    close(got, by_hand(model, method, params, x, masks))
    grads = grad(lambda p: forward(p, x, dropout=masks).sum())(params)
    want = grad(lambda p: by_hand(model, method, p, x, masks).sum())(params)
    close(tree_leaves(grads), tree_leaves(want))
    off = {path: torch.zeros(5, 8, dtype=torch.bool) for path in masks}
    close(forward(params, x, dropout=off), forward(None, x))
    on = {path: torch.ones(5, 8, dtype=torch.bool) for path in masks}
    close(forward(params, x, dropout=on), by_hand(model, method, params, x, on))


def test_without_the_argument_there_is_none_in_either_mode():
    model, method, params, x = case()
    y = fa.bind(model.train(), method)(params, x)
    assert torch.equal(y, fa.bind(model.eval(), method)(params, x))
    close(y, by_hand(model, fa.LoRA(rank=2, alpha=4), params, x, {"0": 1, "2": 1}))


def test_a_seed_decides_all_and_every_layer_has_its_own_mask():
    model, method, params, x = case()
    forward = fa.bind(model, method)
    seed = fa.dropout_seeds(seeded(3))
    masks = masks_of(forward, seed, x)
    assert not torch.equal(masks["0"], masks["2"])
    y = ft.assert_pure(lambda: forward(params, x, dropout=seed), model, forward, params, seed)
    close(y, by_hand(model, method, params, x, masks))
    assert torch.equal(y, forward(params, x, dropout=seed))
    assert not torch.equal(y, forward(params, x, dropout=seed + 1))


def test_a_generator_is_a_seed_drawn_from_it():
    model, method, params, x = case()
    forward = fa.bind(model, method)
    g = seeded(3)
    one = ft.assert_pure(lambda: forward(params, x, dropout=g), model, forward, params)
    two = forward(params, x, dropout=g)
    assert not torch.equal(one, two)
    a, b = fa.dropout_seeds(seeded(3)), fa.dropout_seeds(seeded(3), 2)
    assert torch.equal(one, forward(params, x, dropout=a))
    assert torch.equal(a, b[0])
    assert torch.equal(two, forward(params, x, dropout=b[1]))


def test_under_vmap_every_adapter_has_its_own_mask():
    model, method, params, x = case()
    forward = fa.bind(model, method)
    many, seeds = fa.stack([params] * 4), fa.dropout_seeds(seeded(3), 4)

    def run(p, seed):
        return forward(p, x, dropout=seed)

    ys = vmap(run)(many, seeds)
    for y, seed in zip(ys, seeds, strict=True):
        close(y, run(params, seed))
    assert len({tuple(y.flatten().tolist()) for y in ys}) == 4
    close(vmap(run, in_dims=(None, 0))(params, seeds), ys)
    same = vmap(run, in_dims=(0, None))(many, seeds[0])
    assert all(torch.equal(y, same[0]) for y in same)
    grads = vmap(grad(lambda p, s: run(p, s).square().sum()))(many, seeds)
    for g, seed in zip(fa.unstack(grads), seeds, strict=True):
        want = grad(lambda p, s=seed: run(p, s).square().sum())(params)
        close(tree_leaves(g), tree_leaves(want))


def test_derivatives_checkpoint_and_compile_see_one_mask():
    model, method, params, x = case()
    forward, seed = fa.bind(model, method), fa.dropout_seeds(seeded(3))
    masks = masks_of(forward, seed, x)

    def loss(p):
        return forward(p, x, dropout=seed).square().sum()

    want = grad(lambda p: by_hand(model, method, p, x, masks).square().sum())(params)
    close(tree_leaves(grad(loss)(params)), tree_leaves(want))
    again = fa.value_and_grad(lambda p: checkpoint(loss, p, use_reentrant=False))(params)[1]
    close(tree_leaves(again), tree_leaves(want))
    _, slope = jvp(loss, (params,), (params,))
    close(slope, sum((g * p).sum() for g, p in zip(*map(tree_leaves, (want, params)), strict=True)))
    compiled = torch.compile(
        lambda p, s: forward(p, x, dropout=s), fullgraph=True, backend="aot_eager"
    )
    close(compiled(params, seed), forward(params, x, dropout=seed))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_mask_is_as_large_as_its_batch(strict):
    model, method, params, x = case()
    forward, seed = fa.bind(model, method), fa.dropout_seeds(seeded(3))

    class Adapted(nn.Module):
        def forward(self, x, seed):
            return forward(params, x, dropout=seed)

    sizes = {"x": {0: torch.export.Dim("batch", min=2)}, "seed": {}}
    program = torch.export.export(Adapted(), (x, seed), dynamic_shapes=sizes, strict=strict)
    more = torch.cat([x, 2 * x])
    close(program.module()(more, seed), forward(params, more, dropout=seed))


@given(
    p=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9, 0.99]),
    seed=st.integers(0, 2**31 - 1),
    stream=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_the_share_that_is_kept_and_its_independence(p, seed, stream):
    n = 4096
    shape = torch.Size((64, 64))
    seed = torch.tensor(seed)
    kept = keep_mask(seed + stream, shape, p)
    # Six standard deviations of a binomial: one example in 10**9 lies outside.
    assert abs(kept.float().mean() - (1 - p)) <= 6 * math.sqrt(p * (1 - p) / n)
    neighbours = {
        "another layer": keep_mask(seed + stream // 2 + 12345, shape, p),
        "the next seed": keep_mask(seed + 1 + stream, shape, p),
        "the next row": kept.roll(1, 0),
        "the next column": kept.roll(1, 1),
    }
    for what, other in neighbours.items():
        both = (kept & other).float().mean()
        sigma = math.sqrt((1 - p) ** 2 * (1 - (1 - p) ** 2) / n)
        assert abs(both - (1 - p) ** 2) <= 6 * sigma + 1e-9, what


def test_it_keeps_the_mean():
    # One layer, so that the output is linear in the mask: the mean over seeds is the plain output.
    layer = nn.Linear(8, 4).double()
    method = fa.LoRA(rank=2, dropout=0.3)
    g = seeded()
    fresh = fa.init(method, layer, generator=g)
    params = tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=F64), fresh)
    forward, x = fa.bind(layer, method), torch.randn(8, generator=g, dtype=F64)
    ys = vmap(lambda s: forward(params, x, dropout=s))(fa.dropout_seeds(g, 4096))
    error = (ys.mean(0) - forward(params, x)).abs()
    assert (error <= 5 * ys.std(0) / math.sqrt(4096)).all()


@pytest.mark.parametrize(
    ("dropout", "kind", "message"),
    [
        ({"0": torch.ones(5, 8) > 0}, AdapterError, r"one a layer is needed; not so for \['2'\]"),
        (
            {"0": torch.ones(8) > 0, "2": torch.ones(5, 8) > 0},
            AdapterError,
            r"layer '0': expected.*torch.bool \[5, 8\].*got torch.bool \[8\]",
        ),
        (
            {"0": torch.ones(5, 8), "2": torch.ones(5, 8)},
            AdapterError,
            r"got torch.float32 \[5, 8\]",
        ),
        (3, AdapterError, r"expected one seed, torch.int64 \[\].*got 3\. "),
        (torch.tensor(3.0), AdapterError, r"got torch.float32 \[\]\. "),
        (torch.tensor([3, 4]), AdapterError, r"got torch.int64 \[2\]\. .*each call takes one"),
    ],
)
def test_masks_that_do_not_fit(dropout, kind, message):
    model, method, params, x = case()
    with pytest.raises(kind, match=message):
        fa.bind(model, method)(params, x, dropout=dropout)


def test_refusals():
    model, method, params, x = case()
    forward = fa.bind(model, method)
    with pytest.raises(ConfigError, match="the method's dropout is 0"):
        fa.bind(model, fa.LoRA(rank=2))(params, x, dropout=seeded())
    for call in (
        lambda: vmap(lambda p: forward(p, x, dropout=seeded()))(fa.stack([params])),
        lambda: grad(lambda p: forward(p, x, dropout=seeded()).sum())(params),
    ):
        with pytest.raises(ConfigError, match="draw seeds outside"):
            call()
