"""Mixed batches: each row equals its adapter alone, and the base's rows the base, bit for bit."""

import pytest
import torch
from cases import BASES, METHODS, N_IN, dense, eps_of, make, randomized
from torch import nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map
from transforms import error

import fadapt as fa
from fadapt.testing import assert_pure

IDS = [2, -1, 0, 2, 1, -1]
ABLE = [m for m in METHODS if m.name in ("lora", "lora-rs-bias", "oft", "dora")]
SOME = [b for b in BASES if not b.name.endswith(("f64", "-f16"))]
table = pytest.mark.parametrize(
    ("row", "kind"), [pytest.param(b, m, id=f"{b.name}-{m.name}") for b in SOME for m in ABLE]
)


def batch(row, tokens=3):
    g = torch.Generator().manual_seed(5)
    return torch.randn(len(IDS), tokens, N_IN, generator=g).to(row.dtype)


def loop(forward, adapters, ids, x):
    """What a mixed batch must equal: its rows one by one."""
    one = [forward(None if k < 0 else adapters[k], x[i : i + 1]) for i, k in enumerate(ids)]
    return torch.cat(one)


def bound(row):
    # Two layers' sums of N_IN products in another order, each within a few eps; where the
    # activation is rounded, an element may fall to the next of 255 steps.
    return 8 * eps_of(row) + (1 / 127 if row.rounds else 0)


@table
def test_rows_equal_the_loop_and_base_rows_the_base(row, kind):
    c = make(row, kind)
    mixed, x = fa.bind_mixed(c.model, c.method), batch(row)
    y = assert_pure(lambda: mixed(c.many, IDS, x), c.model, mixed, c.many, x)
    assert error(y, loop(c.forward, fa.unstack(c.many), IDS, x)) <= bound(row)
    base = torch.tensor(IDS) < 0
    assert torch.equal(y[base], c.forward(None, x)[base])
    assert not torch.equal(y[~base], c.forward(None, x)[~base])


@table
def test_gradients_of_the_bank_equal_the_loops(row, kind):
    c = make(row, kind)
    mixed, x = fa.bind_mixed(c.model, c.method), batch(row)

    def loss(bank, run):
        return run(bank).float().square().mean()

    def by_mixed(bank):
        return mixed(bank, IDS, x)

    def by_loop(bank):
        adapters = [tree_map(lambda t, k=k: t[k], bank) for k in range(3)]
        return loop(c.forward, adapters, IDS, x)

    want = grad(loss)(c.many, by_loop)
    assert error(grad(loss)(c.many, by_mixed), want) <= 2 * bound(row)
    _, got = fa.value_and_grad(loss)(c.many, by_mixed)
    assert error(got, want) <= 2 * bound(row)


@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 2, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", ABLE, ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["dense-f32", "int8-row-bf16"])
def test_a_training_batch_copies_no_matrix(name, kind, ids):
    c = make(next(b for b in BASES if b.name == name), kind)
    mixed, x = fa.bind_mixed(c.model, c.method), batch(c.row)[: len(ids)]
    (rows,) = mixed.rows(ids, c.many)
    assert rows.grid.tolist() == [[k] * (len(ids) // 3) for k in range(3)]
    assert rows.pick(c.xs) is c.xs

    def loss(p, run):
        return run(p).float().square().sum()

    each = len(ids) // 3
    ys, grads = zip(
        *[
            (c.forward(p, xs), grad(loss)(p, lambda p, xs=xs: c.forward(p, xs)))
            for p, xs in zip(fa.unstack(c.many), x.split(each), strict=True)
        ],
        strict=True,
    )
    assert error(mixed(c.many, (rows,), x), torch.cat(ys)) <= bound(c.row)
    _, got = fa.value_and_grad(loss)(c.many, lambda bank: mixed(bank, ids, x))
    assert error(got, fa.stack(grads)) <= 2 * bound(c.row)


LORA = fa.LoRA(rank=4, alpha=6)


def plain_case(method=LORA, k=3):
    model = nn.Sequential(dense(N_IN, 8), nn.Tanh(), dense(8, 8))
    g = torch.Generator().manual_seed(0)
    fresh = fa.init(method, model, generator=g)
    return model, [randomized(fresh, seed) for seed in range(k)]


@pytest.mark.parametrize("tokens", [1, 40])  # both forms of the product, on a CPU
@pytest.mark.parametrize("ids", [[0, 1, 2, 1, -1, 0, 2], [1, 1], [-1, -1], [2, -1], [1]])
@pytest.mark.parametrize("bias", [False, True])
def test_both_forms_equal_the_loop(tokens, ids, bias):
    method = fa.LoRA(rank=4, alpha=6, lora_bias=bias)
    model, adapters = plain_case(method)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), tokens, N_IN, generator=g)
    y = fa.bind_mixed(model, method)(fa.stack(adapters), ids, x)
    want = loop(fa.bind(model, method), adapters, ids, x)
    assert error(y, want) <= 8 * torch.finfo(torch.float32).eps  # as bound()
    flat = fa.bind_mixed(model, method)(fa.stack(adapters), torch.tensor(ids), x[:, 0])
    assert error(flat, want[:, 0]) <= 8 * torch.finfo(torch.float32).eps


def test_what_another_row_wears_reaches_no_row():
    model, adapters = plain_case()
    adapters[0] = tree_map(lambda t: torch.full_like(t, torch.nan), adapters[0])
    x = torch.randn(4, 2, N_IN, generator=torch.Generator().manual_seed(1))
    mixed, bank = fa.bind_mixed(model, LORA), fa.stack(adapters)
    for run in (mixed, vmap(mixed, in_dims=(None, None, 0))):
        xs = x if run is mixed else x[None]
        y = run(bank, [0, -1, 1, -1], xs).reshape(4, 2, -1)
        assert y[0].isnan().all()
        assert torch.equal(y[1::2], fa.bind(model, LORA)(None, x)[1::2])
        assert y[2].isfinite().all()


def test_adapters_that_differ_in_rank_alpha_targets_and_bias():
    model = nn.Sequential(dense(N_IN, 8), nn.Tanh(), dense(8, 8))
    methods = [
        fa.LoRA(rank=3, alpha=5, targets=["0"]),
        fa.LoRA(rank=4, alpha=2, rslora=True),
        fa.LoRA(rank=1, targets=["2"], lora_bias=True),
    ]
    g = torch.Generator().manual_seed(0)
    adapters = [randomized(fa.init(m, model, generator=g), s) for s, m in enumerate(methods)]
    bank, unit = fa.stack(adapters, methods=methods)
    x = torch.randn(len(IDS), 2, N_IN, generator=g)
    y = fa.bind_mixed(model, unit)(bank, IDS, x)
    for i, k in enumerate(IDS):
        method, adapter = (unit, None) if k < 0 else (methods[k], adapters[k])
        alone = fa.bind(model, method)(adapter, x[i])
        assert error(y[i], alone) <= 8 * torch.finfo(torch.float32).eps  # as bound()


@pytest.mark.parametrize("name", ["dense-f32", "int8-row-f32", "int8-dynamic-f32"])
def test_compiled_once_for_all_ids(name):
    row = next(b for b in BASES if b.name == name)
    c = make(row, METHODS[0])
    mixed, x = fa.bind_mixed(c.model, c.method), batch(row)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    call = torch.compile(lambda b, i, x: mixed(b, i, x), fullgraph=True, backend=count)
    for ids in (IDS, [0, 0, 1, -1, 2, 2]):
        y = call(c.many, torch.tensor(ids), x)
        assert error(y, loop(c.forward, fa.unstack(c.many), ids, x)) <= bound(row)
    assert graphs == 1

    def loss(bank, ids):
        return mixed(bank, ids, x).square().mean()

    step = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    got, want = step(c.many, torch.tensor(IDS)), grad(loss)(c.many, torch.tensor(IDS))
    assert error(got, want) <= 2 * bound(row)
    torch._dynamo.reset()


@pytest.mark.parametrize("row", [b for b in BASES if b.compiled], ids=lambda b: b.name)
def test_a_bank_of_several_methods_compiled_on_every_base(row):
    by_name = {m.name: m for m in METHODS}
    cases = [make(row, by_name[name]) for name in ("lora", "dora", "oft")]
    methods = [c.method for c in cases]
    bank, kinds = fa.stack([c.params for c in cases], methods=methods)
    mixed, x = fa.bind_mixed(cases[0].model, kinds), batch(row)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    call = torch.compile(mixed, fullgraph=True, backend=count)
    for ids in (IDS, [0, 0, 1, -1, 2, 2]):
        y = call(bank, torch.tensor(ids), x)
        one = [cases[k].forward(cases[k].params if k >= 0 else None, x[i : i + 1])
               for i, k in enumerate(ids)]  # fmt: skip
        assert error(y, torch.cat(one)) <= bound(row)
    assert graphs == 1
    torch._dynamo.reset()


def test_mapped_over_ids_over_banks_and_forward_mode():
    model, adapters = plain_case()
    mixed, bank = fa.bind_mixed(model, LORA), fa.stack(adapters)
    x = torch.randn(3, 2, N_IN, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, -1], [2, 2, 0]])
    eps = torch.finfo(torch.float32).eps
    want = torch.stack([mixed(bank, i, x) for i in ids])
    assert error(vmap(mixed, in_dims=(None, 0, None))(bank, ids, x), want) <= 8 * eps
    banks = tree_map(lambda t: torch.stack([t, 2 * t]), bank)
    got = vmap(mixed, in_dims=(0, None, None))(banks, ids[0], x)
    assert error(got[0], want[0]) <= 8 * eps

    def f(bank):
        return mixed(bank, ids[0], x)

    _, slope = torch.func.jvp(f, (bank,), (bank,))
    twin = tree_map(lambda t: t.double(), (bank, model.double().state_dict()))
    exact = fa.bind_mixed(model, LORA)
    h = 1e-6
    high, low = (exact(tree_map(lambda t, s=s: t * s, twin[0]), ids[0], x.double())
                 for s in (1 + h, 1 - h))  # fmt: skip
    assert error(slope, (high - low) / (2 * h)) <= 1e-4  # of a difference quotient, and float32


@pytest.mark.parametrize("ids", [[0, 1, 1], [0, 1]], ids=["sorted", "grid"])
def test_rows_of_a_bank_that_has_grown(ids):
    model, adapters = plain_case()
    mixed, x = fa.bind_mixed(model, LORA), torch.ones(len(ids), 2, N_IN)
    rows = mixed.rows(ids, fa.stack(adapters[:2]))
    with pytest.raises(fa.errors.AdapterError, match=r"for banks of \[2\] adapters.*holds \[3\]"):
        mixed(fa.stack(adapters[:3]), rows, x)


def test_an_id_a_row_through_an_embedding():
    model, method = torch.nn.Sequential(torch.nn.Embedding(7, 4)), fa.LoRA(rank=2, targets=["0"])
    adapters = [randomized(fa.init(method, model, generator=torch.Generator()), k) for k in (0, 1)]
    x, ids = torch.tensor([3, 5, 6]), [1, 0, -1]
    found = fa.bind_mixed(model, method)(fa.stack(adapters), ids, x)
    plain = fa.bind(model, method)
    want = [plain(None if k < 0 else adapters[k], x[i]) for i, k in enumerate(ids)]
    torch.testing.assert_close(found, torch.stack(want))


def test_no_rows_at_all():
    model, adapters = plain_case()
    mixed, x = fa.bind_mixed(model, LORA), torch.ones(0, 2, N_IN)
    assert mixed(fa.stack(adapters), [], x).shape == (0, 2, 8)


def test_rows_are_checked_once_for_many_calls():
    model, adapters = plain_case()
    mixed, bank = fa.bind_mixed(model, LORA), fa.stack(adapters)
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1))
    rows = mixed.rows([2, -1, 0], bank)
    assert torch.equal(mixed(bank, rows, x), mixed(bank, [2, -1, 0], x))
    assert torch.equal(mixed(None, rows, x), fa.bind(model, LORA)(None, x))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = dense(4, 4)

    def forward(self, x):
        return self.inner(x.reshape(-1, 4))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, b, x: m(b, [0, 3, 1], x), r"\[3\] are not in this bank of 3"),
        (lambda m, b, x: m(b, [0, -2, 1], x), r"\[-2\] are not in this bank"),
        (lambda m, b, x: m(b, torch.tensor([0, 1, 7]), x), r"\[7\] are not"),
        (lambda m, b, x: m(b, [0, "b", 1], x), r"Bank's ids"),
        (lambda m, b, x: m(b, [0, True, 1], x), "expected integers"),
        (lambda m, b, x: m(b, 1, x), "expected integers"),
        (lambda m, b, x: m(b, None, x), "expected integers"),
        (lambda m, b, x: m(b, [0, 2**70, 1], x), r"\[\d+\] are not in this bank"),
        (lambda m, b, x: m(b, torch.tensor([0.0, 1.0, 1.0]), x), "expected integers"),
        (lambda m, b, x: m(b, torch.tensor([[0], [1], [1]]), x), "expected integers"),
        (lambda m, b, x: m(b, [0, 1], x), "for 2 ids"),
        (lambda m, b, x: m(b, [0], x[0]), "first axis"),
        (lambda m, b, x: m({"0": b["0"]}, [0, 1, 2], x), "1 missing"),
        (lambda m, b, x: m({"0": b["0"], "2": tree_map(lambda t: t[:2], b["2"])}, [0], x), "bank"),
        (lambda m, b, x: m(fa.unstack(b)[0], [0], x), "not a bank"),
        (lambda m, b, x: m(fa.unstack(b), [0], x), r"expected a stack .* got a list of 3"),
        (lambda m, b, x: m((b,), [0], x), r"expected a stack .* got a tuple of 1"),
        (lambda m, b, x: m(fa.Bank.of(plain_case()[0], LORA), [0], x), r"params of .* got a Bank"),
    ],
)
def test_errors(call, match):
    model, adapters = plain_case()
    x = torch.ones(3, N_IN)
    with pytest.raises(fa.errors.AdapterError, match=match):
        call(fa.bind_mixed(model, LORA), fa.stack(adapters), x)


def test_layers_that_join_rows_and_methods_without_a_rule_are_errors():
    joined = Joined()
    bank = fa.stack([fa.init(fa.LoRA(rank=2), joined, generator=torch.Generator())])
    with pytest.raises(fa.errors.AdapterError, match=r"'inner' gets an input \[4, 4\] for 2 ids"):
        fa.bind_mixed(joined, fa.LoRA(rank=2))(bank, [0, 0], torch.ones(2, 8))

    class Twice(fa.LoRA):
        def apply(self, base, params, x, keep=None):
            return 2 * super().apply(base, params, x, keep)

    with pytest.raises(fa.errors.ConfigError, match="Twice has no apply_rows of its own"):
        fa.bind_mixed(joined, Twice(rank=2))
    with pytest.raises(fa.errors.ConfigError, match="modules_to_save"):
        fa.bind_mixed(plain_case()[0], fa.LoRA(targets=["0"], modules_to_save=["2"]))


def test_a_llama_with_padding():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    method = fa.LoRA(rank=4, alpha=8)
    g = torch.Generator().manual_seed(0)
    fresh = fa.init(method, model, generator=g)
    adapters = [randomized(fresh, s) for s in range(2)]
    tokens = torch.randint(0, 32, (4, 6), generator=g)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[0, :3] = 0
    ids = [1, -1, 0, 1]
    mixed = fa.bind_mixed(model, method)
    y = mixed(fa.stack(adapters), ids, tokens, attention_mask=mask).logits
    forward = fa.bind(model, method)
    for i, k in enumerate(ids):
        params = None if k < 0 else adapters[k]
        alone = forward(params, tokens[i : i + 1], attention_mask=mask[i : i + 1]).logits
        start = int(6 - mask[i].sum())
        # float32 through two blocks: sums of up to 24 products in another order
        assert error(y[i, start:], alone[0, start:]) <= 1e-5


def kinds_case():
    model = nn.Sequential(dense(N_IN, 8), nn.Tanh(), dense(8, 8))
    methods = [
        fa.OFT(block_size=4),
        fa.LoRA(rank=3, alpha=5, targets=["0"]),
        fa.DoRA(rank=2, targets=["2"]),
        fa.OFT(block_size=4),
        fa.LoRA(rank=1, alpha=3, lora_bias=True),
        fa.OFT(block_size=2, targets=["2"]),
    ]
    g = torch.Generator().manual_seed(0)
    adapters = [randomized(fa.init(m, model, generator=g), s) for s, m in enumerate(methods)]
    return model, methods, adapters


@pytest.mark.parametrize("ids", [[5, 0, -1, 2, 1, 4, 3, 0], [1, 1], [-1]])
def test_a_bank_of_several_methods(ids):
    model, methods, adapters = kinds_case()
    bank, kinds = fa.stack(adapters, methods=methods)
    assert len(bank) == 4  # OFT of 4, LoRA, DoRA, OFT of 2
    x = torch.randn(len(ids), 2, N_IN, generator=torch.Generator().manual_seed(1))
    mixed = fa.bind_mixed(model, kinds)
    forwards = [fa.bind(model, m) for m in methods]

    def by_loop(adapters):
        one = [forwards[k](adapters[k] if k >= 0 else None, x[i]) for i, k in enumerate(ids)]
        return torch.stack(one)

    eps = torch.finfo(torch.float32).eps  # 8 of them as bound(); a rotation is a product more
    y = assert_pure(lambda: mixed(bank, ids, x), model, mixed, bank, x)
    assert error(y, by_loop(adapters)) <= 16 * eps
    traced = vmap(mixed, in_dims=(None, 0, None))(bank, torch.tensor([ids]), x)[0]
    assert error(traced, by_loop(adapters)) <= 16 * eps
    base = torch.tensor(ids) < 0
    assert torch.equal(y[base], forwards[0](None, x)[base])
    if len(set(ids)) == 7:
        got = fa.unstack(grad(lambda b: mixed(b, ids, x).square().mean())(bank), kinds)
        want = grad(lambda a: by_loop(a).square().mean())(adapters)
        # unstack divides LoRA's B by its scaling; a gradient of the folded B is multiplied by it
        for k in (0, 2, 3, 5):
            assert error(got[k], want[k]) <= 32 * eps


def test_a_bank_of_several_methods_comes_apart_and_checks_its_ids():
    model, methods, adapters = kinds_case()
    bank, kinds = fa.stack(adapters, methods=methods, fold=False)
    back = fa.unstack(bank, kinds)
    for one, adapter in zip(back, adapters, strict=True):
        assert error(one, adapter) == 0
    mixed = fa.bind_mixed(model, kinds)
    for ids in ([6, 0], torch.tensor([6, 0]), [-2, 0]):
        with pytest.raises(fa.errors.AdapterError, match="not in this bank of 6"):
            mixed(bank, ids, torch.ones(2, N_IN))
    with pytest.raises(fa.errors.AdapterError, match="expected integers"):
        mixed(bank, None, torch.ones(2, N_IN))
    with pytest.raises(fa.errors.AdapterError, match=r"a tuple of 4 stacks .* got a dict"):
        mixed(bank[0], [0, 0], torch.ones(2, N_IN))
    same, method = fa.stack([adapters[0], adapters[3]], methods=[methods[0], methods[3]])
    assert method == methods[0]
    assert same["0"].oft_R.shape[0] == 2
