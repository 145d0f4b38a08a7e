"""A bank of adapters by name: room to grow, places used again, paging, and errors that teach.

``FADAPT_TEST_DEVICE=cuda pytest tests/test_bank.py`` runs it on a GPU, where paging is a copy from
pinned memory and a captured graph sees what is added.
"""

import gc

import pytest
import torch
from cases import DEVICE, N_IN, dense, randomized
from torch import nn
from torch.utils._pytree import tree_leaves
from transforms import error

import fadapt as fa
from fadapt.testing import assert_pure

EPS = torch.finfo(torch.float32).eps  # 8 of them: two layers' sums in another order


def net() -> nn.Module:
    return nn.Sequential(dense(N_IN, 8), nn.Tanh(), dense(8, 8)).to(DEVICE)


def make(model, method, seed):
    g = torch.Generator().manual_seed(seed)
    return randomized(fa.init(method, model, generator=g), seed)


def filled(model, count, **options):
    methods = {
        f"a{i}": fa.LoRA(rank=1 + i % 4, alpha=3 + i, targets=[["0"], ["0", "2"]][i % 2])
        for i in range(count)
    }
    adapters = {n: make(model, m, i) for i, (n, m) in enumerate(methods.items())}
    bank = fa.Bank.of(model, fa.LoRA(rank=4), **options)
    for name, params in adapters.items():
        bank = bank.add(name, params, methods[name])
    return bank, adapters, methods


def rows(names):
    g = torch.Generator().manual_seed(7)
    return torch.randn(len(names), 2, N_IN, generator=g).to(DEVICE)


def check(model, mixed, bank, names, adapters, methods):
    x = rows(names)
    y = mixed(bank.params, bank.ids(names), x)
    for i, name in enumerate(names):
        alone = model(x[i]) if name == "base" else None
        if alone is None:
            alone = fa.bind(model, methods[name])(adapters[name], x[i])
        assert error(y[i], alone.detach()) <= 8 * EPS


def test_adapters_of_any_rank_and_alpha_run_by_name():
    model = net()
    bank, adapters, methods = filled(model, 3, capacity=4)
    assert bank.names == bank.resident == ["a0", "a1", "a2"]
    assert "a1" in bank
    mixed = fa.bind_mixed(model, bank.method)
    check(model, mixed, bank, ["a2", "base", "a0", "a1", "a2"], adapters, methods)


def test_adding_within_the_capacity_moves_nothing_and_recompiles_nothing():
    model = net()
    bank, *_ = filled(model, 2, capacity=4)
    mixed, graphs = fa.bind_mixed(model, bank.method), 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    call = torch.compile(mixed, fullgraph=True, backend=count)
    before = [t.data_ptr() for t in tree_leaves(bank.params)]
    x = rows(["a"] * 3)
    first = call(bank.params, torch.tensor(bank.ids(["a0", "a1", "base"])), x)
    method = fa.LoRA(rank=3, alpha=1)
    params = make(model, method, 9)
    grown = assert_pure(lambda: bank.add("new", params, method), model, params)
    assert [t.data_ptr() for t in tree_leaves(grown.params)] == before
    y = call(grown.params, torch.tensor(grown.ids(["new", "a1", "base"])), x)
    assert graphs == 1
    assert error(y[0], fa.bind(model, method)(params, x[0])) <= 8 * EPS
    assert torch.equal(y[1:], first[1:])
    assert "new" not in bank  # which is as it was
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("paged", [False, True])
def test_a_captured_graph_runs_the_adapters_that_came_after_it(paged):
    model = net()
    bank, adapters, methods = filled(model, 2, capacity=3, paged=paged)
    bank = bank.page(["a0", "a1"]) if paged else bank
    mixed, params = fa.bind_mixed(model, bank.method), bank.params
    names = ["a0", "base", "a1"]
    x, ids = rows(names), torch.tensor(bank.ids(names), device=DEVICE)
    graph = fa.cuda_graph(lambda ids, x: mixed(params, ids, x), ids, x)
    new = fa.LoRA(rank=3, alpha=1)
    adapters["new"], methods["new"] = make(model, new, 9), new
    bank = bank.add("new", adapters["new"], new)
    later = ["new", "base", "a1"]
    bank = bank.page(later) if paged else bank
    y = graph(torch.tensor(bank.ids(later), device=DEVICE), x)
    for i, name in enumerate(later):
        alone = None if name == "base" else adapters[name]
        want = fa.bind(model, methods.get(name, new))(alone, x[i])
        assert error(y[i], want.detach()) <= 8 * EPS


def test_a_full_bank_grows_and_the_old_one_still_runs():
    model = net()
    small, adapters, methods = filled(model, 2, capacity=2)
    kept = small.params
    large, more, others = filled(model, 5, capacity=2)
    assert tree_leaves(large.params)[0].shape[0] == 8
    mixed = fa.bind_mixed(model, small.method)
    check(model, mixed, large, ["a4", "a0", "a3", "a1", "a2"], more, others)
    grown = small.add("x", adapters["a0"], methods["a0"])
    check(model, mixed, small, ["a1", "a0"], adapters, methods)
    check(model, mixed, grown, ["x", "a1"], adapters | {"x": adapters["a0"]},
          methods | {"x": methods["a0"]})  # fmt: skip
    assert small.params is kept


def test_a_place_is_used_again_only_when_no_version_needs_it():
    model = net()
    bank, adapters, methods = filled(model, 2, capacity=2)
    mixed = fa.bind_mixed(model, bank.method)
    less = bank.remove("a0")
    other = less.add("new", adapters["a1"], methods["a1"])
    assert tree_leaves(other.params)[0].shape[0] == 4  # `bank` still needs the first place
    check(model, mixed, bank, ["a0", "a1"], adapters, methods)
    del bank
    gc.collect()
    again = less.add("new", adapters["a1"], methods["a1"])
    assert tree_leaves(again.params)[0].shape[0] == 2
    assert again.ids(["new", "a1"]) == [0, 1]
    with pytest.raises(fa.errors.AdapterError, match="no adapter 'a0'"):
        less.ids(["a0"])


def test_more_adapters_than_fit_are_paged_the_least_recently_used_first():
    model = net()
    bank, adapters, methods = filled(model, 5, capacity=2, paged=True)
    mixed = fa.bind_mixed(model, bank.method)
    assert bank.resident == []
    with pytest.raises(fa.errors.AdapterError, match="'a0' is on the host"):
        bank.ids(["a0"])
    bank = bank.page(["a0", "a1"])
    check(model, mixed, bank, ["a1", "base", "a0"], adapters, methods)
    before = bank
    bank = bank.page(["a0", "base"]).page(["a4", "a0"])
    assert sorted(bank.resident) == ["a0", "a4"]  # a1 was the least recently used
    check(model, mixed, bank, ["a4", "a0", "a4"], adapters, methods)
    with pytest.raises(fa.errors.AdapterError, match="'a1' is on the host"):
        before.ids(["a1"])
    assert before.ids(["a0"]) == bank.ids(["a0"])
    for names in (["a2", "a3"], ["a3", "a1"], ["a0"], ["a1", "a4"]):
        bank = bank.page(names)
        assert len(bank.resident) == 2
        check(model, mixed, bank, names, adapters, methods)
    with pytest.raises(fa.errors.AdapterError, match="3 adapters at once, and room for 2"):
        bank.page(["a0", "a1", "a2"])


def test_a_bank_has_room_for_just_the_adapters_that_it_is_made_of():
    model = nn.Sequential(dense(N_IN, 8), nn.Sequential(dense(8, 8))).to(DEVICE)
    # "0" is the end of "1.0"
    methods = {
        "a": fa.LoRA(rank=3, alpha=2, targets=r"1\.0"),
        "b": fa.LoRA(rank=1, rank_pattern={r"1\.0": 2}, rslora=True, lora_bias=True),
        "c": fa.OFT(block_size=4, targets="0"),
        "d": fa.DoRA(rank=2),
        "e": fa.OFT(block_size=4, targets="0", dropout=0.1),
        "f": fa.OFT(block_size=4),
    }
    adapters = {n: make(model, m, i) for i, (n, m) in enumerate(methods.items())}
    given = {n: (adapters[n], methods[n]) for n in methods}
    bank = assert_pure(lambda: fa.Bank.holding(model, given), model, adapters)
    lora, *others = bank.params
    assert {p: leaf.lora_A.shape[:2] for p, leaf in lora.items()} == {"0": (2, 1), "1.0": (2, 3)}
    rooms = [(sorted(kind), len(tree_leaves(kind)[0])) for kind in others]
    assert rooms == [(["0"], 2), (["0", "1.0"], 1), (["0", "1.0"], 1)]
    mixed = fa.bind_mixed(model, bank.method)
    check(model, mixed, bank, ["f", "base", *"abcde"], adapters, methods)
    with pytest.raises(fa.errors.AdapterError, match="at least one adapter"):
        fa.Bank.holding(model, {})
    saved = fa.LoRA(targets=["0"], modules_to_save=["1"])
    with pytest.raises(fa.errors.AdapterError, match=r"'x' does not fit .* trained themselves"):
        fa.Bank.holding(model, {"x": (make(model, saved, 0), saved)})


def test_several_methods_and_prepared_once():
    model = net()
    templates = [fa.LoRA(rank=4), fa.OFT(block_size=4), fa.DoRA(rank=2)]
    methods = {"l": fa.LoRA(rank=2, targets=["0"]), "o": fa.OFT(block_size=4),
               "d": fa.DoRA(rank=2), "p": fa.OFT(block_size=4)}  # fmt: skip
    adapters = {n: make(model, m, i) for i, (n, m) in enumerate(methods.items())}
    bank = fa.Bank.of(model, templates, capacity=2)
    for name, params in adapters.items():
        bank = bank.add(name, params, methods[name])
    mixed = fa.bind_mixed(model, bank.method)
    assert bank.ids(["l", "o", "p", "d", "base"]) == [0, 2, 3, 4, -1]
    check(model, mixed, bank, ["o", "l", "base", "d", "p"], adapters, methods)
    assert mixed.prepare(bank.params)[1] is bank.params[1]  # R is not built again


@pytest.mark.parametrize(
    ("call", "name", "match"),
    [
        (lambda m, b: b.ids(["a9"]), "AdapterError", "no adapter 'a9'. Near misses: 'a0'"),
        (lambda m, b: b.ids(["Base"]), "AdapterError", "no adapter 'Base'. Near misses: 'base'"),
        (lambda m, b: b.remove("base"), "AdapterError", "'base' is the model without"),
        (lambda m, b: b.ids("a0"), "AdapterError", "expected a list of names"),
        (lambda m, b: b.page("a0"), "AdapterError", "expected a list of names"),
        (lambda m, b: fa.Bank.holding(m, {"a": {}}), "AdapterError", "expected .params, method"),
        (lambda m, b: b.remove("ba"), "AdapterError", "no adapter 'ba'"),
        (lambda m, b: add(m, b, fa.LoRA(rank=2), "a0"), "AdapterError", "remove it first"),
        (lambda m, b: add(m, b, fa.LoRA(rank=2), "base"), "AdapterError", "cannot be called"),
        (lambda m, b: add(m, b, fa.LoRA(rank=5)), "AdapterError", "rank 5, the bank room for 4"),
        (lambda m, b: add(m, b, fa.LoRA(lora_bias=True, rank=1)), "AdapterError", "lora_bias=True"),
        (lambda m, b: add(m, b, fa.OFT(block_size=4)), "AdapterError", "it is OFT, and the place"),
        (lambda m, b: b.add("x", {"1": make(m, fa.LoRA(rank=1), 0)["0"]}, fa.LoRA(rank=1)),
         "AdapterError", r"layers '1' are not among the 2"),
        (lambda m, b: b.add("x", {}, fa.LoRA(rank=1)), "AdapterError", "it adapts no layer"),
        (lambda m, b: fa.Bank.of(m, fa.LoRA(), capacity=0), "ConfigError", "capacity"),
        (lambda m, b: fa.Bank.of(m, []), "ConfigError", "at least one"),
        (lambda m, b: fa.Bank.of(m, fa.LoRA(), capacity=[2, 2]), "ConfigError", "2 capacities"),
        (lambda m, b: fa.Bank.of(m, fa.LoRA(targets=["0"], modules_to_save=["2"])),
         "ConfigError", "modules_to_save"),
        (lambda m, b: add(m, fa.Bank.of(m, fa.OFT(block_size=4)), fa.OFT(block_size=4, coft=True)),
         "AdapterError", "coft=True against False"),
        (lambda m, b: add(m, fa.Bank.of(m, fa.OFT(block_size=4)),
                          fa.OFT(block_size=4, targets=["0"])), "AdapterError", "lacks the layers"),
    ],
)  # fmt: skip
def test_errors(call, name, match):
    model = net()
    bank, _, _ = filled(model, 1)
    with pytest.raises(getattr(fa.errors, name), match=match):
        call(model, bank)


def add(model, bank, method, name="x"):
    return bank.add(name, make(model, method, 0), method)
