"""Several adapters at once: in order, weighted, and as merging them one after the other gives."""

import itertools

import pytest
import torch
from cases import dense, randomized, row, torchao
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map
from transforms import error

import fadapt as fa
from fadapt.testing import assert_pure

F64 = torch.float64
KINDS = {
    "lora": fa.LoRA(rank=2, alpha=6),
    "bias": fa.LoRA(rank=1, lora_bias=True),
    "oft": fa.OFT(block_size=4),
    "dora": fa.DoRA(rank=2),
}
EPS = 64 * torch.finfo(F64).eps  # two layers of 16 products, a rotation and a norm before each


def net(dtype=F64):
    return nn.Sequential(dense(16, 8, dtype), nn.Tanh(), dense(8, 8, dtype))


def adapter(model, method, seed):
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(seed))
    return randomized(fresh, seed)


def inputs(dtype=F64):
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("names", itertools.product(KINDS, repeat=2), ids="-".join)
def test_applying_in_order_is_merging_in_order(names):
    model, methods, x = net(), [KINDS[n] for n in names], inputs()
    adapters = [adapter(model, m, k) for k, m in enumerate(methods)]
    forward = fa.bind(model, methods)
    got = assert_pure(lambda: forward(adapters, x), model, adapters, x)
    state = fa.merge(model, adapters, methods)
    assert error(got, functional_call(model, state, (x,))) <= EPS
    step = functional_call(model, fa.merge(model, adapters[0], methods[0]), (x,))
    once = fa.merged_model(model, adapters[0], methods[0])
    twice = functional_call(once, fa.merge(once, adapters[1], methods[1]), (x,))
    assert error(got, twice) <= EPS
    assert error(forward([adapters[0], None], x), step) <= EPS
    assert torch.equal(forward(None, x), model(x))


def test_lora_sums_and_weights_scale():
    model, method, x = net(), KINDS["lora"], inputs()
    p, q = adapter(model, method, 0), adapter(model, method, 1)
    forward = fa.bind(model, method)
    got = forward([p, q], x, weights=[0.5, -2.0])
    both = {
        path: fa.LoRAParams(
            torch.cat([p[path].lora_A, q[path].lora_A]),
            torch.cat([0.5 * p[path].lora_B, -2 * q[path].lora_B], 1),
        )
        for path in p
    }
    want = fa.bind(model, fa.LoRA(rank=4, alpha=12))(both, x)
    assert error(got, want) <= EPS
    assert error(forward([p, q], x), forward([q, p], x)) <= EPS
    oft = KINDS["oft"]
    r = adapter(model, oft, 2)
    half = tree_map(lambda t: t / 2, r)
    assert error(fa.bind(model, [oft])([r], x, weights=[0.5]), fa.bind(model, oft)(half, x)) <= EPS


@pytest.mark.parametrize("names", [("oft", "lora"), ("lora", "dora")], ids="-".join)
def test_every_transform_over_int8(names):
    make = torchao(row, torch.float32)
    model = nn.Sequential(make(16, 8), nn.Tanh(), make(8, 8))
    methods, x = [KINDS[n] for n in names], inputs(torch.float32)
    stacks = [
        fa.stack([adapter(model, m, k + 2 * j) for j in range(2)]) for k, m in enumerate(methods)
    ]
    forward = fa.bind(model, methods)
    each = [tree_map(lambda t, k=k: t[k], stacks) for k in range(2)]
    # float32, as the first test's bound.
    bound = 64 * torch.finfo(torch.float32).eps

    def loss(p, w, x):
        return forward(p, x, weights=[w, 1] if names[1] == "dora" else [w, w]).square().sum()

    w = torch.tensor(0.7)
    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None, None))(stacks, w, x)
    for k, p in enumerate(each):
        leaves = tree_map(lambda t: t.clone().requires_grad_(), p)
        weight = w.clone().requires_grad_()
        loss(leaves, weight, x).backward()
        assert (
            error(tree_map(lambda t, k=k: t[k], got[0]), tree_map(lambda t: t.grad, leaves))
            <= bound
        )
        assert error(got[1][k], weight.grad) <= bound
    _, ahead = jvp(lambda w: loss(each[1], w, x), (w,), (torch.ones(()),))
    assert error(ahead, weight.grad) <= bound
    compiled = torch.compile(lambda p: forward(p, x), backend="aot_eager", fullgraph=True)
    assert error(compiled(each[0]), forward(each[0], x)) <= bound


def test_dropout_is_another_for_each():
    model, x = net(), inputs()
    methods = [fa.LoRA(rank=2, dropout=0.5), fa.LoRA(rank=2, dropout=0.5)]
    p = adapter(model, methods[0], 0)
    minus = tree_map(torch.clone, p)
    minus = {k: leaf._replace(lora_B=-leaf.lora_B) for k, leaf in minus.items()}
    forward, seed = fa.bind(model, methods), fa.dropout_seeds(torch.Generator().manual_seed(1))
    assert error(forward([p, minus], x), model(x)) <= EPS  # they cancel
    dropped = forward([p, minus], x, dropout=seed)
    assert error(dropped, model(x)) > 0.01  # and do not under masks of their own
    assert torch.equal(dropped, forward([p, minus], x, dropout=seed))


def test_dropout_beside_an_adapter_of_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    methods = [fa.LoRA(rank=2, targets=[path], dropout=0.5) for path in ("0", "1")]
    g = torch.Generator().manual_seed(0)
    params = [randomized(fa.init(m, model, generator=g), k) for k, m in enumerate(methods)]
    forward, ids, seed = fa.bind(model, methods), torch.tensor([[1, 2]]), torch.tensor(3)
    dropped = forward(params, ids, dropout=seed)
    assert torch.equal(dropped, forward(params, ids, dropout=seed))
    assert not torch.equal(dropped, forward(params, ids))


def test_a_module_trained_whole_by_one_and_adapted_by_another():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    methods = [fa.LoRA(rank=2, targets=["0"], modules_to_save=["1"]), fa.LoRA(rank=2)]
    with pytest.raises(
        fa.errors.ConfigError, match="module '1' is trained whole by one of the methods"
    ):
        fa.bind(model, methods)


def test_errors():
    model, x = net(), inputs()
    lora, dora = adapter(model, KINDS["lora"], 0), adapter(model, KINDS["dora"], 1)
    forward = fa.bind(model, [KINDS["lora"], KINDS["dora"]])
    with pytest.raises(fa.errors.AdapterError, match=r"1 adapters were given; .* 2 methods"):
        forward([lora], x)
    with pytest.raises(fa.errors.AdapterError, match="3 weights were given"):
        forward([lora, dora], x, weights=[1, 1, 1])
    with pytest.raises(fa.errors.AdapterError, match="DoRAParams has no part that a weight"):
        forward([lora, dora], x, weights=[1, 2])
    with pytest.raises(fa.errors.ConfigError, match="no methods"):
        fa.bind(model, [])
