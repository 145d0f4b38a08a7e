"""bind: a pure forward over any model, which it shares and never touches."""

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fadapt as fa
import fadapt.testing as ft
from fadapt.errors import AdapterError, ConfigError, TargetError

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module, seed=0) -> nn.Module:
    """The model with normal weights, in float64."""
    g = seeded(seed)
    for p in model.double().parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64) / 2
    return model


def adapter(model, method, seed=1):
    params = fa.init(method, model, generator=seeded(seed))
    g = seeded(seed)
    return tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=t.dtype) / 2, params)


def merged(model, method, params):
    """A copy of the model whose weights hold the update: the oracle."""
    twin = copy.deepcopy(model)
    for path, m in method.at([p for p in params if hasattr(params[p], "_fields")]).items():
        layer, p = twin.get_submodule(path), params[path]
        # Another tensor in its place: whatever shares the old one keeps it.
        layer.weight = nn.Parameter(layer.weight + m.scaling * p.lora_B @ p.lora_A)
        if m.lora_bias:
            bias = 0 if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(bias + m.scaling * p.lora_bias)
    return twin


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64, sums in another order


@given(data=st.data(), model=ft.models(ft.dtypes(F64)))
@settings(max_examples=60, deadline=None)
def test_binding_shares_every_tensor_and_changes_nothing(data, model):
    method = data.draw(ft.methods(model, [fa.LoRA]))
    params = data.draw(ft.adapters(model, method))
    x = data.draw(ft.inputs(model))
    forward = ft.assert_pure(lambda: fa.bind(model, method), model)
    mine = {p.data_ptr() for p in model.parameters()}
    held = {p.data_ptr() for p in forward.shell.parameters()}
    assert held <= mine
    assert not any(p.requires_grad for p in forward.shell.parameters())
    y = ft.assert_pure(lambda: forward(params, x), model, forward, params, x)
    close(y, merged(model, method, params)(x))


def test_no_gradient_reaches_the_model_and_all_reach_the_adapter():
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    method = fa.LoRA(rank=2, targets=["0"])
    params = adapter(model, method)
    for leaf in tree_leaves(params):
        leaf.requires_grad_()
    forward, x = fa.bind(model, method), torch.randn(5, 4, dtype=F64, generator=seeded())
    optimizer = torch.optim.SGD(tree_leaves(params), lr=0.1)
    before = forward(params, x).square().mean()
    before.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(leaf.grad.count_nonzero() == leaf.numel() for leaf in tree_leaves(params))
    optimizer.step()
    assert forward(params, x).square().mean() < before
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_works_alongside_and_its_updates_are_seen():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    first, second = fa.LoRA(rank=1, targets=["0"]), fa.LoRA(rank=2)
    one, two = fa.bind(model, first), fa.bind(model, second)
    x = torch.ones(2, 4, dtype=F64)
    p, q = adapter(model, first), adapter(model, second)
    a, b, c = one(p, x), two(q, x), model(x)
    assert torch.equal(one(p, x), a)
    assert torch.equal(two(q, x), b)
    assert torch.equal(model(x), c)
    with torch.no_grad():
        model[1].weight.mul_(2)  # by the user: the forward shares the storage
    close(one(p, x), merged(model, first, p)(x))


def test_batch_norm_in_training_normalizes_by_the_batch_and_keeps_its_statistics():
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    method = fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.randn(8, 4, dtype=F64, generator=seeded())
    forward = fa.bind(model, method)
    want = merged(model, method, params)(x)
    close(ft.assert_pure(lambda: forward(params, x), model, forward), want)
    ft.assert_pure(lambda: grad(lambda p: forward(p, x).sum())(params), model, forward)
    with torch.no_grad():
        model(x)  # moves the running statistics, once
    model.eval()
    assert forward.shell.training  # the mode is that of the time of binding
    close(forward(params, x), want)
    close(fa.bind(model, method)(params, x), merged(model, method, params)(x))


def test_statistics_stay_whatever_the_modules_are_called():
    # As timm's DLA calls its stem: the name that an adapted layer has for what it replaced.
    model = nn.Sequential()
    model.add_module("base_layer", nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    model.add_module("head", nn.Linear(6, 3))
    filled(model)
    method = fa.LoRA(rank=2, targets=["head"])
    params, x = adapter(model, method), torch.randn(8, 4, dtype=F64, generator=seeded())
    ft.assert_pure(lambda: fa.bind(model, method)(params, x), model)


class Notes(nn.Module):
    """Keeps tensors of its own beside its buffers, and writes to all of them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self._sums = torch.zeros(4, dtype=F64), [torch.zeros(4, dtype=F64)]
        self.again, self.named = self.calls, {"count": torch.zeros((), dtype=F64)}
        self.register_buffer("table", torch.zeros(6, dtype=F64))
        self.head, self.tail = self.table[:3], self.table[2:]  # they overlap

    def forward(self, x):
        self.calls.add_(1)
        self._sums[0].add_(self.again)
        self.named["count"] += 2
        self.head.add_(1)
        self.tail.mul_(3)
        y = self.last(torch.tanh(self.first(x)))
        return y + self._sums[0] + self.named["count"] * self.table.sum()


def test_tensors_that_are_plain_attributes_are_written_in_copies(tmp_path):
    model = filled(Notes()).eval().requires_grad_(False)
    method = fa.LoRA(rank=2, targets=["first"])
    params, x = adapter(model, method), torch.randn(3, 4, dtype=F64, generator=seeded())
    want = merged(model, method, params)(x)
    bank, given = fa.stack([params, params]), {"inputs": {"x": x}, "dynamic": {"x": {0: "batch"}}}
    forward, mixed = fa.bind(model, method), fa.bind_mixed(model, method)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    path = tmp_path / "graph.pt2"

    def exported():
        fa.export(model, method, path, bank=bank, **given)
        return fa.load_export(path)([0, 1, 0], {"x": x}, bank)[0]

    calls = {
        "eager": lambda: forward(params, x),
        "mixed": lambda: mixed(bank, [0, 1, 0], x),
        "mapped": lambda: vmap(forward, (0, None))(bank, x)[1],
        "composed": lambda: fa.bind(model, [method])([params], x),
        "compiled": lambda: compiled(params, x),
        "copied": lambda: copy.deepcopy(forward)(params, x),
        "exported": exported,
    }
    for call in calls.values():
        call()  # which sets up loggers of torch's own
        close(ft.assert_pure(call, model, forward, mixed, params), want)
    ft.assert_pure(lambda: grad(lambda p: forward(p, x).sum())(params), model, forward)


class Remembers(nn.Module):
    """Keeps what it first saw, and how often it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.first, self.calls = nn.Linear(4, 4), None, 0
        self.fresh = True

    def forward(self, x):
        if self.first is None:
            self.first = x
        if hasattr(self, "fresh"):
            del self.fresh
            self.calls += 10
        self.calls += 1
        self.scale = getattr(self, "scale", 1.0) * 2
        self.inner.register_forward_hook(lambda module, args, y: 2 * y)
        return self.inner(x) * self.scale + self.first.sum() + self.calls


def test_what_a_forward_sets_is_forgotten():
    model = filled(nn.Sequential(Remembers(), nn.Linear(4, 4))).eval()
    method = fa.LoRA(rank=2)
    params, g = adapter(model, method), seeded()
    forward, x = fa.bind(model, method), torch.randn(3, 4, dtype=F64, generator=g)
    bank, mixed = fa.stack([params, params]), fa.bind_mixed(model, method)
    for x in torch.randn(2, 3, 4, dtype=F64, generator=g):
        want = merged(model, method, params)(x)
        close(ft.assert_pure(lambda x=x: forward(params, x), model, forward), want)
        close(vmap(forward, (0, None))(bank, x)[1], want)
        close(ft.assert_pure(lambda x=x: mixed(bank, [0, 1, 0], x), model, mixed), want)


def test_rotary_embeddings_that_grow_do_so_in_every_call():
    # transformers' "dynamic" ones note the longest sequence so far beside the buffer that it needs.
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=16, max_position_embeddings=8, initializer_range=0.5,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    forward = fa.bind(model, fa.LoRA(rank=2, targets=["q_proj"]))
    for length in (4, 16, 16, 4, 16):
        ids = torch.arange(length)[None] % 16
        want = copy.deepcopy(model)(ids).logits
        assert torch.equal(forward(None, ids).logits, want)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.heads = nn.ModuleDict({"main": nn.Linear(4, 7, bias=False)})
        self.heads["main"].weight = self.embed.weight
        self.layers[1].weight = self.layers[0].weight

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.heads["main"](h)


@pytest.mark.parametrize("targets", [["heads.main"], ["layers.0"], ["layers.1"], "all-linear"])
def test_tied_weights_are_adapted_where_they_are_targets_and_nowhere_else(targets):
    model, method = filled(Tied()), fa.LoRA(rank=2, targets=targets)
    params, ids = adapter(model, method), torch.tensor([[1, 2, 6]])
    close(fa.bind(model, method)(params, ids), merged(model, method, params)(ids))
    assert model.heads["main"].weight is model.embed.weight


def test_a_module_under_two_names_is_adapted_once_and_runs_at_both():
    inner = nn.Linear(4, 4)
    model = filled(nn.Sequential(inner, nn.Tanh(), inner))
    method = fa.LoRA(rank=2, targets=["2"])
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    assert list(params) == ["0"]
    forward = fa.bind(model, method)
    assert forward.shell[0] is forward.shell[2]
    want = torch.tanh(merged(inner, method, {"": params["0"]})(x))
    close(forward(params, x), merged(inner, method, {"": params["0"]})(want))


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, *, extra=None, many=()):
        y = self.lin(x) * scale
        return Pair(y, {"sum": y.sum(), "extra": extra, "many": [self.lin(m) for m in many]})


def test_inputs_and_outputs_of_any_shape():
    model, method = filled(Nested()), fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    forward, twin = fa.bind(model, method), merged(model, method, params)
    for args, kwargs in [
        ((x,), {}),
        ((x, 3.0), {"extra": "text"}),
        ((), {"x": x, "scale": x[:, :1], "many": (x, 2 * x)}),
    ]:
        got, want = forward(params, *args, **kwargs), twin(*args, **kwargs)
        assert isinstance(got, Pair)
        assert got.rest["extra"] == want.rest["extra"]
        close([got.first, got.rest["sum"], *got.rest["many"]],
              [want.first, want.rest["sum"], *want.rest["many"]])  # fmt: skip
    ys = vmap(lambda p, x: forward(p, x=x).rest["sum"])(fa.stack([params] * 2), torch.stack([x, x]))
    close(ys[1], twin(x).rest["sum"])


def test_a_transformers_output_comes_back_as_it_is():
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
        tie_word_embeddings=True,
    )
    model = filled(transformers.LlamaForCausalLM(config)).eval()
    method = fa.LoRA(rank=2, targets=["q_proj", "down_proj", "lm_head"])
    params, ids = adapter(model, method), torch.tensor([[1, 2, 3]])
    forward = fa.bind(model, method)
    got = forward(params, input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
    want = merged(model, method, params)(
        input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False
    )
    assert type(got) is type(want)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    close(got.hidden_states, want.hidden_states)
    with torch.no_grad():
        assert torch.equal(forward(None, ids).logits, model(ids).logits)


def test_hooks_fire_as_they_did():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda m, args, y: 2 * y)
    model[0].register_forward_hook(lambda m, args, kwargs, y: y - 3, with_kwargs=True)
    model[1].register_forward_hook(lambda m, args, y: y.exp())
    method = fa.LoRA(rank=2, targets=["0"])
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    p, layer = params["0"], model[0]
    inner = (x + 1) @ (layer.weight + p.lora_B @ p.lora_A).mT + layer.bias
    close(fa.bind(model, method)(params, x), (2 * inner - 3).tanh().exp())
    assert torch.equal(fa.bind(model, method)(None, x), model(x))


def test_code_that_reads_a_layers_attributes_finds_them():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.lin.note = "kept"
            self.constant = torch.ones(4)

        def forward(self, x):
            assert self.lin.note == "kept"
            assert self.lin.in_features == 4
            return self.lin(x.to(self.lin.weight.dtype)) + self.constant

    model, method = filled(Reader()), fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.ones(2, 4)
    forward = fa.bind(model, method)
    close(forward(params, x), merged(model, method, params)(x))
    assert forward.shell.constant.data_ptr() == model.constant.data_ptr()
    with pytest.raises(AttributeError, match="missing"):
        _ = forward.layers["lin"].missing


def test_a_state_stands_in_for_the_models_tensors():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
    method = fa.LoRA(rank=2)
    state = {"0.weight": 2 * model[0].weight.detach(), "1.running_mean": torch.ones(4, dtype=F64)}
    x = torch.ones(2, 4, dtype=F64)
    forward = ft.assert_pure(lambda: fa.bind(model, method, state=state), model, state)
    want = torch.func.functional_call(model, state, x)
    assert torch.equal(forward(None, x), want)
    with pytest.raises(AdapterError, match=r"no tensor '0.wieght'.*'0.weight'"):
        fa.bind(model, method, state={"0.wieght": x})
    # The first would broadcast.
    for other in (torch.ones(1, dtype=F64), torch.ones(4)):
        got = re.escape(f"got {other.dtype} {list(other.shape)}")
        match = rf"'1.running_mean' is torch.float64 \[4\] in the model, and {got}"
        for bind in (fa.bind, fa.bind_mixed):
            with pytest.raises(AdapterError, match=match):
                bind(model, method, state={"1.running_mean": other})


def test_modules_to_save_are_trained_whole():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    method = fa.LoRA(rank=2, targets=["0"], modules_to_save=["1", "2"])
    params, x = fa.init(method, model, generator=seeded()), torch.ones(2, 4, dtype=F64)
    assert params.keys() == {"0", "1", "2"}
    assert params["2"]["weight"].data_ptr() != model[2].weight.data_ptr()
    forward = fa.bind(model, method)
    assert torch.equal(forward(params, x), forward(None, x))
    params = adapter(model, method)
    twin = merged(model, method, params)
    for path in ("1", "2"):
        twin.get_submodule(path).load_state_dict(params[path])
    close(forward(params, x), twin(x))
    grads = grad(lambda p: forward(p, x).square().sum())(params)
    assert all(g.count_nonzero() for g in tree_leaves(grads))
    with pytest.raises(AdapterError, match=r"module '1' is trained itself: .*'weight', 'bias'"):
        forward(params | {"1": {"weight": params["1"]["weight"]}}, x)
    # Either would have run: a bias of one element broadcasts.
    for wrong in (
        params["2"] | {"bias": torch.zeros(1)},
        {n: t[:1] for n, t in params["2"].items()},
    ):
        with pytest.raises(AdapterError, match=r"module '2' is trained itself: expected .* \[1"):
            forward(params | {"2": wrong}, x)
    with pytest.raises(TargetError, match="inside another saved module"):
        fa.bind(Tied(), fa.LoRA(targets=["main"], modules_to_save=["layers", "layers.0"]))


def test_what_is_trained_itself_may_be_wider_than_the_model(tmp_path):
    """float32 beside bfloat16, as PEFT loads it: cast to what the model has there."""
    layers = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    model = filled(nn.Sequential(*layers)).bfloat16().eval().requires_grad_(False)
    method = fa.LoRA(rank=2, targets=["0"], modules_to_save=["2"], bias="all")
    params = tree_map(torch.Tensor.float, adapter(model, method))
    assert params["2"]["weight"].dtype == torch.float32
    forward, x = fa.bind(model, method), torch.ones(3, 4).bfloat16()
    fa.save_peft(tmp_path, params, method, model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    want = theirs(x).detach()
    assert want.dtype == torch.bfloat16
    eps = 4 * torch.finfo(torch.bfloat16).eps
    for got in (
        forward(params, x),
        fa.merged_model(model, params, method)(x),
        fa.bind(model, [method])([params], x),
    ):
        torch.testing.assert_close(got, want, rtol=eps, atol=eps * float(want.abs().max()))
    grads = grad(lambda p: forward(p, x).float().square().sum())(params)
    assert {g.dtype for g in tree_leaves(grads)} == {torch.float32}
    assert all(g.count_nonzero() for g in tree_leaves(grads))
    whole = params | {"2": tree_map(torch.Tensor.long, params["2"])}
    with pytest.raises(AdapterError, match=r"of a floating dtype, got torch.int64 \[2, 4\]"):
        forward(whole, x)


def test_a_forward_that_raises_leaves_no_trace():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    method = fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    forward = fa.bind(model, method)

    def fails():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            forward(params, x[:, :3])

    ft.assert_pure(fails, model, forward, params)
    assert torch.equal(forward(None, x), model(x))


def test_a_call_from_another_thread_is_refused_while_one_runs():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            inside.set()
            go_on.wait(10)
            return super().forward(x)

    model = filled(nn.Sequential(nn.Linear(4, 4), Waits(4, 3)))
    method = fa.LoRA(rank=2, targets=["0"])
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    forward, other = fa.bind(model, method), fa.bind(model, method)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(forward, params, x)
        assert inside.wait(10)
        try:
            with pytest.raises(AdapterError, match="running in another thread"):
                forward(None, x)
        finally:
            go_on.set()
        assert torch.equal(first.result(10), other(params, x))
    assert torch.equal(forward(None, x), other(None, x))  # the shell was given back


def test_a_buffer_of_two_names_is_given_back():
    norm = nn.BatchNorm1d(4)
    model = filled(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)).train()
    method = fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    forward = fa.bind(model, method)
    ft.assert_pure(lambda: forward(params, x), model, forward, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"0": p["0"]}, r"1 missing \['2'\]"),
        (lambda p: p | {"3": p["2"]}, r"1 unknown \['3'\]"),
        (lambda p: {"0": p["0"], "2": p["0"]}, r"layer '2'.*lora_A \[r, 6\] and lora_B \[3, r\]"),
        (lambda p: {k: tuple(v) for k, v in p.items()}, "expected a LoRAParams"),
        (lambda p: fa.stack([p, p]), r"lora_A \[2, 2, 4\].*vmap"),
        (
            lambda p: p | {"0": p["0"]._replace(lora_A=p["0"].lora_A.half())},
            r"layer '0'.*one floating dtype.*float16 and torch.float64",
        ),
        (lambda p: p | {"0": p["0"]._replace(lora_B=p["0"].lora_B[:, :1])}, r"lora_B \[6, 1\]"),
        (lambda p: p | {"0": p["0"]._replace(lora_B=p["0"].lora_B.T)}, r"lora_B \[2, 6\]"),
        (
            lambda p: p | {"0": p["0"]._replace(lora_B=1.0)},
            "layer '0'.*tensors, and one is a float",
        ),
        (
            lambda p: torch.ones(2, 4),
            "got a Tensor.*takes the adapter first.*forward\\(params, x\\)",
        ),
    ],
)
def test_adapters_that_do_not_fit(change, message):
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    method = fa.LoRA(rank=2)
    params, forward = adapter(model, method), fa.bind(model, method)
    forward(params, torch.ones(2, 4, dtype=F64))  # that one adapter fitted says nothing of the next
    with pytest.raises(AdapterError, match=re.compile(message, re.S)):
        forward(change(params), torch.ones(2, 4, dtype=F64))


@pytest.mark.parametrize("shape", [(1,), (2, 3)])  # each of which broadcasts
def test_a_learned_bias_of_another_shape(shape):
    model, method = nn.Linear(4, 3), fa.LoRA(rank=2, lora_bias=True)
    params = fa.init(method, model, generator=seeded())
    params[""] = params[""]._replace(lora_bias=torch.ones(shape))
    with pytest.raises(AdapterError, match=r"layer '': expected lora_bias \[3\]"):
        fa.bind(model, method)(params, torch.ones(2, 4))


def test_any_rank_of_adapter_will_do():
    model = filled(nn.Linear(4, 4))
    forward, x = fa.bind(model, fa.LoRA(rank=2)), torch.ones(2, 4, dtype=F64)
    method = fa.LoRA(rank=3, alpha=3)
    params = adapter(model, method)
    close(forward(params, x), merged(model, method, params)(x))


def test_init_without_a_generator_and_the_global_one_untouched():
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="draws random numbers"):
        fa.init(fa.LoRA(rank=2), model)
    one = ft.assert_pure(lambda: fa.init(fa.LoRA(rank=2), model, generator=seeded(3)), model)
    two = fa.init(fa.LoRA(rank=2), model, generator=seeded(3))
    assert torch.equal(one[""].lora_A, two[""].lora_A)
    assert not any(leaf.requires_grad for leaf in tree_leaves(one))


def test_a_bound_forward_can_be_copied():
    model = filled(nn.Sequential(nn.Linear(4, 4)))
    method = fa.LoRA(rank=2)
    params, x = adapter(model, method), torch.ones(2, 4, dtype=F64)
    forward = fa.bind(model, method)
    twin = copy.deepcopy(forward)
    assert torch.equal(twin(params, x), forward(params, x))
    assert "1 layers" in repr(forward)
    bank, mixed = fa.stack([params, params]), fa.bind_mixed(model, method)
    want = mixed(bank, [1, -1], x)  # a call, after which it knows where its tensors go
    assert torch.equal(copy.deepcopy(mixed)(bank, [1, -1], x), want)
    assert not torch.equal(want, mixed(None, None, x))


def test_a_layer_takes_its_input_by_the_name_that_it_has_itself():
    linear, x = nn.Linear(4, 3), torch.ones(2, 4)
    conv = transformers.pytorch_utils.Conv1D(3, 4)
    for layer, name in ((linear, "input"), (conv, "x")):
        method = fa.LoRA(rank=2, init="orthogonal")
        params = fa.init(method, layer, generator=torch.Generator().manual_seed(0))
        want = fa.bind(layer, method)(params, x)
        assert torch.equal(fa.bind(layer, method)(params, **{name: x}), want)
        assert torch.equal(fa.bind(layer, method)(None, **{name: x}), layer(**{name: x}))
        assert torch.equal(fa.bind(layer, [method])([params], **{name: x}), want)
        mixed = fa.bind_mixed(layer, method)(fa.stack([params]), [0, 0], **{name: x})
        # One product of both rows, or one a row: another order of the sums.
        torch.testing.assert_close(mixed, want, rtol=1e-6, atol=1e-6)
