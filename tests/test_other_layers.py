"""LoRA over embeddings and convolutions: every law, every transform, and PEFT as the oracle."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import BaseRow, Case, K, randomized
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transforms import TRANSFORMS, error, loss, plain_grads

import fadapt as fa
from fadapt.errors import AdapterError, CheckpointError, ConfigError, UnsupportedLayerError
from fadapt.testing import assert_pure

pytestmark = [
    # PEFT's own: it calls a method that transformers renamed; Gloo of no distributed run.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # A lora_B.bias is one-dimensional, which PEFT's check for sharded tensors takes for a fault.
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),
    # PEFT asks for get_input_embeddings, which a plain module has not.
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]
F64 = torch.float64
# Five layers of at most 24 products in float64, and as many on the way back for each order.
EPS = 32 * torch.finfo(F64).eps
PAD = 2
KINDS = ["emb", "one", "two", "three"]


class Net(nn.Module):
    """A convolution in 1, 2 and 3 dimensions, a linear layer and an embedding: ``[..., 16] ->
    [..., 8]``."""

    def __init__(self, dilation=1, mode="zeros"):
        super().__init__()
        self.one = nn.Conv1d(2, 3, 3, stride=2, padding=1)
        self.two = nn.Conv2d(1, 2, (2, 3), padding=(1, 2), dilation=dilation, padding_mode=mode)
        self.three = nn.Conv3d(2, 2, (1, 3, 1), padding="same", bias=False)
        self.emb = nn.Embedding(11, 8, padding_idx=PAD)
        self.lin = nn.LazyLinear(8)
        self.register_buffer("ids", torch.tensor([[3, PAD, 3], [10, 0, 4]]))

    def forward(self, x, ids=None):
        h = torch.tanh(self.one(x.reshape(-1, 2, 8)))
        h = torch.tanh(self.two(h.unsqueeze(1)))
        h = self.three(h.unsqueeze(-1)).flatten(1)
        table = self.emb(self.ids if ids is None else ids)
        return (torch.tanh(self.lin(h)) * table.sum((0, 1))).reshape(*x.shape[:-1], 8)


def net(dtype=F64, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(**kwargs)
        model(torch.zeros(1, 16))
    return model.to(dtype).requires_grad_(False)


METHOD = fa.LoRA(rank=2, alpha=6, targets=[*KINDS, "lin"])
BIASED = fa.LoRA(rank=2, rslora=True, lora_bias=True, targets=["one", "two"])


def adapter(method, model, seed=0):
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(seed))
    return randomized(fresh, seed)


def inputs():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=F64)


def by_hand(model, method):
    """The same function of plain torch, over weights to which the update has been added."""
    model = copy.deepcopy(model)
    model.emb.padding_idx = None  # of the sum, whose gradient B does get

    def run(params, x):
        weights = {}
        for path, leaf in params.items():
            A, B, *bias = leaf
            own = model.get_submodule(path)
            if path == "emb":  # the row of the padding gets no gradient
                A = torch.where(torch.arange(11) == PAD, A.detach(), A)
                delta = (B @ A).mT
            else:
                delta = torch.einsum("or,r...->o...", B, A)
            weights[f"{path}.weight"] = own.weight + method.scaling * delta
            for b in bias:
                weights[f"{path}.bias"] = own.bias + method.scaling * b
        return functional_call(model, weights, (x,))

    return run


def case(method=METHOD):
    model = net()
    g = torch.Generator().manual_seed(0)
    adapters = [adapter(method, model, seed) for seed in range(K)]
    xs = torch.randn(K, 3, 16, generator=g, dtype=F64)
    moves = tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=F64), (adapters[0], xs[0]))
    forward, row = fa.bind(model, method), BaseRow("dense", lambda i, o: model, F64)
    many = fa.stack(adapters)
    reference = by_hand(model, method)
    return Case(row, method, model, forward, reference, adapters[0], many, xs[0], xs, moves)


@pytest.fixture(scope="module")
def whole():
    return case()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform(whole, name):
    c = whole
    got, want, order = TRANSFORMS[name]
    value = assert_pure(lambda: got(c), c.model, c.forward, c.params, c.many, c.x, c.xs)
    assert error(value, want(c)) <= (1, 2, 4)[order] * EPS


@pytest.mark.parametrize("name", ["call", "vmap_of_grad"])
def test_compiled(whole, name):
    c = whole
    got, want, order = TRANSFORMS[name]

    def call(params, many, x, xs, tangents):
        data = (params, many, x, xs, tangents)
        return got(Case(c.row, c.method, c.model, c.forward, c.reference, *data))

    fn = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert error(fn(c.params, c.many, c.x, c.xs, c.tangents), want(c)) <= (1, 2, 4)[order] * EPS


def test_jvp_compiled(whole):
    c = whole

    def slope(p, t):
        return torch.func.jvp(lambda p: c.forward(p, c.x), (p,), (t,))

    fn = torch.compile(slope, fullgraph=True, backend="aot_eager")
    assert error(fn(c.params, c.tangents[0]), slope(c.params, c.tangents[0])) <= 2 * EPS


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_exported(whole):
    c = whole
    leaves, spec = tree_flatten(c.params)

    class Adapted(nn.Module):
        def forward(self, x, *leaves):
            return c.forward(tree_unflatten(list(leaves), spec), x)

    shapes = {"x": {0: torch.export.Dim("batch", min=2)}, "leaves": tuple({} for _ in leaves)}
    program = torch.export.export(Adapted(), (c.x, *leaves), dynamic_shapes=shapes).module()
    x = c.xs.flatten(0, 1)[:7]
    assert error(program(x, *leaves), c.forward(c.params, x)) <= EPS


@pytest.mark.parametrize("method", [METHOD, BIASED], ids=["lora", "bias"])
def test_laws_of_one_adapter(method):
    c = case(method)
    fresh = fa.init(method, c.model, generator=torch.Generator().manual_seed(5))
    assert torch.equal(c.forward(fresh, c.x), c.forward(None, c.x))
    assert torch.equal(c.forward(None, c.x), c.model(c.x))
    want = c.forward(c.params, c.x)
    assert error(want, c.reference(c.params, c.x)) <= EPS
    state = assert_pure(lambda: fa.merge(c.model, c.params, method), c.model, c.params)
    assert error(functional_call(c.model, state, (c.x,)), want) <= EPS
    merged, record = fa.merged_model(c.model, c.params, method, undo=True)
    assert [type(m) for m in merged.modules()] == [type(m) for m in c.model.modules()]
    assert error(merged(c.x), want) <= EPS
    for undo, share in ((None, EPS), (record, 0)):
        back = fa.unmerge(merged, c.params, method, undo=undo)
        own = {name: c.model.state_dict()[name] for name in back}
        assert error(back, own) <= share
    report = fa.merge_report(c.model, c.params, method)
    assert report.lost == []
    assert all(one.weight.captured > 1 - 1e-9 for one in report.layers.values())
    moved = (merged.two.weight - c.model.two.weight).norm() / merged.two.weight.norm()
    assert report.layers["two"].weight.delta == pytest.approx(float(moved), rel=1e-5)


def test_the_initial_values_are_peft_s_in_kind():
    model, g = net(), torch.Generator().manual_seed(0)
    wide = replace(METHOD, rank=256)
    p = fa.init(wide, model, generator=g)
    assert all(t.dtype == F64 for t in tree_leaves(p))
    assert not p["emb"].lora_embedding_A.any()
    assert not any(p[path].lora_B.any() for path in KINDS[1:])
    # 2048 and 768 numbers: five standard errors of a mean, of a variance.
    assert abs(p["emb"].lora_embedding_B.mean()) < 5 / 2048**0.5
    assert abs(p["emb"].lora_embedding_B.var() - 1) < 5 * (2 / 2048) ** 0.5
    bound = (2 * 3) ** -0.5  # kaiming_uniform, a = sqrt(5): of a patch of 6
    assert p["one"].lora_A.shape == (256, 2, 3)
    assert 0.95 * bound < p["one"].lora_A.abs().max() <= bound
    std = fa.init(replace(wide, init="gaussian"), model, generator=g)["one"].lora_A.std()
    assert std == pytest.approx(1 / 256, rel=0.1)


@pytest.mark.parametrize("method", [METHOD, BIASED], ids=["lora", "bias"])
def test_a_stack_of_adapters_that_differ(method):
    model = net()
    small, large = replace(method, rank=1), replace(method, rank=3, alpha=2)
    if not method.lora_bias:
        small = replace(small, targets=["two", "emb"])
    a, b = adapter(small, model, 0), adapter(large, model, 1)
    many, unit = fa.stack([a, b], methods=[small, large])
    x = inputs()
    forward = fa.bind(model, unit)
    each = [fa.bind(model, small)(a, x), fa.bind(model, large)(b, x), model(x)]
    assert error(vmap(forward, (0, None))(many, x), torch.stack(each[:2])) <= EPS
    for got, want in zip(fa.unstack(many, unit), (a, b), strict=True):
        assert [type(leaf) for leaf in got.values()] == [type(want[path]) for path in got]
        assert error(got, {path: want[path] for path in got}) <= torch.finfo(F64).eps


class Rows(nn.Module):
    """Ids ``[n, m]`` in, and a row's output its own alone."""

    def __init__(self, net):
        super().__init__()
        self.emb, self.one, self.two = net.emb, net.one, net.two

    def forward(self, tokens):
        h = self.one(self.emb(tokens)[:, :2])
        return self.two(h.unsqueeze(1)).flatten(1)


def test_a_mixed_batch_is_the_loop():
    model, method = Rows(net()).eval(), fa.LoRA(rank=2, alpha=6, targets=["emb", "one", "two"])
    adapters = [adapter(method, model, seed) for seed in range(2)]
    many, mixed, forward = fa.stack(adapters), fa.bind_mixed(model, method), fa.bind(model, method)
    ids = torch.tensor([[1, 5], [PAD, 7], [9, PAD], [0, 0]])
    for worn in ([1, 0, -1, 1], [0, 0, 1, 1], [-1] * 4):
        want = torch.cat(
            [forward(None if k < 0 else adapters[k], ids[i : i + 1]) for i, k in enumerate(worn)]
        )
        got = assert_pure(lambda worn=worn: mixed(many, worn, ids), model, many)
        assert error(got, want) <= EPS
        if -1 not in worn:
            grads = grad(lambda m, worn=worn: mixed(m, worn, ids).square().sum())(many)
            loop = grad(
                lambda m, worn=worn: sum(
                    forward(tree_map(lambda t, k=k: t[k], m), ids[i : i + 1]).square().sum()
                    for i, k in enumerate(worn)
                )
            )(many)
            assert error(grads, loop) <= 4 * EPS
    fn = torch.compile(lambda m, k, i: mixed(m, k, i), fullgraph=True, backend="aot_eager")
    worn = torch.tensor([1, 0, -1, 1])
    assert error(fn(many, worn, ids), mixed(many, worn, ids)) <= EPS
    bank = fa.Bank.of(model, replace(method, rank=4), capacity=2, dtype=F64)
    for k, params in enumerate(adapters):
        bank = bank.add(str(k), params, method)
    held = fa.bind_mixed(model, bank.method)(bank.params, bank.ids(["1", "0", "base", "1"]), ids)
    assert error(held, mixed(many, worn, ids)) <= EPS
    bank = fa.Bank.holding(model, {str(k): (p, method) for k, p in enumerate(adapters)}, dtype=F64)
    held = fa.bind_mixed(model, bank.method)(bank.params, bank.ids(["1", "0", "base", "1"]), ids)
    assert error(held, mixed(many, worn, ids)) <= EPS
    one = fa.bind_mixed(model.one, replace(method, targets=""))
    with pytest.raises(AdapterError, match=r"a convolution is \[n, in, \*size\]"):
        one({"": many["one"]}, [0, 1], torch.zeros(2, 8, dtype=F64))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_mixed_batch_exported(suffix, tmp_path):
    model = Rows(net(torch.float32)).eval()
    method = fa.LoRA(rank=2, alpha=6, targets=["emb", "one", "two"])
    many = fa.stack([adapter(method, model, seed) for seed in range(3)])
    path, tokens = tmp_path / f"graph{suffix}", torch.arange(8).reshape(4, 2)
    inputs, dynamic = {"tokens": tokens}, {"tokens": {0: "batch"}}
    fa.export(model, method, path, bank=many, inputs=inputs, dynamic=dynamic)
    tokens, worn = torch.tensor([[1, 5], [PAD, 7], [9, PAD]]), [2, -1, 0]
    want = fa.bind_mixed(model, method)(many, worn, tokens)
    (got,) = fa.load_export(path)(worn, {"tokens": tokens}, many)
    assert error(got, want) <= 32 * torch.finfo(torch.float32).eps


def test_dropout_acts_on_the_image_and_not_on_ids():
    model = net()
    method = replace(METHOD, dropout=0.5)
    p, forward = adapter(method, model), fa.bind(model, method)
    x = inputs()
    seed = fa.dropout_seeds(torch.Generator().manual_seed(2))
    y = forward(p, x, dropout=seed)
    assert error(y, forward(p, x)) > 0.01
    only = replace(method, targets=["emb", "one"])
    two = {path: p[path] for path in ("one", "emb")}
    keep = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(3)) > 0.5
    got = fa.bind(model, only)(two, x, dropout={"one": keep})
    h = model.one(x.reshape(-1, 2, 8))
    slid = torch.conv1d(x.reshape(-1, 2, 8) * keep * 2, p["one"].lora_A, None, 2, 1)
    h = h + method.scaling * torch.einsum("or,nrl->nol", p["one"].lora_B, slid)
    hook = model.one.register_forward_hook(lambda *_: h)
    want = by_hand(model, method)({"emb": p["emb"]}, x)
    hook.remove()
    assert error(got, want) <= EPS
    with pytest.raises(ConfigError, match="no adapted layer but embeddings"):
        fa.bind(model, replace(method, targets=["emb"]))({"emb": p["emb"]}, x, dropout=seed)


def test_several_in_order_and_combined():
    model = net()
    other = replace(METHOD, rank=4, alpha=2)
    p, q = adapter(METHOD, model, 0), adapter(other, model, 1)
    x = inputs()
    got = fa.bind(model, [METHOD, other])([p, q], x, weights=[0.5, -1.0])
    both, wide = fa.combine([p, q], torch.tensor([0.5, -1.0]), "cat", methods=[METHOD, other])
    assert error(got, fa.bind(model, wide)(both, x)) <= EPS
    state = fa.merge(model, [p, q], [METHOD, other])
    got = fa.bind(model, [METHOD, other])([p, q], x)
    assert error(functional_call(model, state, (x,)), got) <= EPS


RULES = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "ties_svd": {"density": 0.5},
}


@pytest.mark.parametrize("rule", RULES)
def test_combining_is_peft_s(rule):
    model = net(torch.float32)
    # PEFT's SVD takes a convolution of two dimensions alone.
    method = replace(METHOD, targets=["two", "emb", "lin"]) if "svd" in rule else METHOD
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(method.targets))
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.add_adapter("other", config)
    pair = [adapter(method, model, seed) for seed in range(2)]
    for name, params in zip(("default", "other"), pair, strict=True):
        fill(wrapped, params, name)
    wrapped.add_weighted_adapter(
        ["default", "other"], [0.7, 0.4], "mix", combination_type=rule, **RULES[rule]
    )
    wrapped.set_adapter("mix")
    both, wide = fa.combine(pair, [0.7, 0.4], rule, methods=method, **RULES[rule])
    x = inputs().float()
    got, want = fa.bind(model, wide)(both, x), wrapped(x)
    # float32; an SVD's factors are known to its condition, some ten eps.
    assert error(got, want) <= 64 * torch.finfo(torch.float32).eps


def fill(wrapped, params, name="default"):
    """The numbers of ``params`` in PEFT's layers."""
    with torch.no_grad():
        for path, leaf in params.items():
            layer = wrapped.get_submodule(f"base_model.model.{path}")
            if path == "emb":
                layer.lora_embedding_A[name].copy_(leaf.lora_embedding_A)
                layer.lora_embedding_B[name].copy_(leaf.lora_embedding_B)
                continue
            layer.lora_A[name].weight.copy_(leaf.lora_A)
            B = layer.lora_B[name].weight
            B.copy_(leaf.lora_B.reshape(B.shape))
            if hasattr(leaf, "lora_bias"):
                layer.lora_B[name].bias.copy_(leaf.lora_bias)


@pytest.mark.parametrize("method", [METHOD, BIASED], ids=["lora", "bias"])
def test_peft_is_the_oracle(method, tmp_path):
    model = net()
    config = LoraConfig(
        r=2,
        lora_alpha=6 if method is METHOD else 2,
        use_rslora=method.rslora,
        lora_bias=method.lora_bias,
        target_modules=list(method.targets),
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    params, x = adapter(method, model), inputs()
    fill(wrapped.double(), params)
    forward = fa.bind(model, method)
    want = wrapped(x)
    assert error(forward(params, x), want) <= EPS
    want.square().mean().backward()
    grads = grad(loss(forward))(params, x)
    assert error(grads, plain_grads(loss(forward), params, x)[0]) <= 2 * EPS
    for path, leaf in grads.items():
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        if path == "emb":
            theirs = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            assert not leaf.lora_embedding_A[:, PAD].any()
        else:
            theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if method.lora_bias:
                theirs += (layer.lora_B["default"].bias,)
        for ours, own in zip(leaf, theirs, strict=True):
            assert error(ours, own.grad.reshape(ours.shape)) <= 2 * EPS

    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    loaded, same = fa.load_peft(tmp_path / "theirs", model)
    assert all(map(torch.equal, tree_leaves(loaded), tree_leaves(params)))
    assert [type(leaf) for leaf in loaded.values()] == [type(params[path]) for path in loaded]
    for given in (model, None):
        fa.save_peft(tmp_path / "ours", loaded, same, given)
        files = [tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours")]
        theirs, ours = map(load_file, files)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert error(again.double()(x), want) <= EPS

    state = fa.merge(model, params, method)
    merged = wrapped.merge_and_unload().state_dict()
    assert error(state, {name: merged[name] for name in state}) <= EPS


def test_a_transformers_embedding_both_ways(tmp_path):
    from test_peft import IDS, llama, out, peft_model

    model = llama()
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    wrapped = peft_model(model, config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        wrapped.save_pretrained(tmp_path)  # the table itself is in the file too
    params, method = fa.load_peft(tmp_path, model)
    got = fa.bind(model, method)(params, IDS).logits
    eps = torch.finfo(torch.float32).eps
    assert error(got, out(wrapped)) <= 32 * eps
    mixed = fa.bind_mixed(model, method)(fa.stack([params]), [0, -1], IDS).logits
    assert error(mixed, torch.stack([got[0], model(IDS).logits[1]])) <= 32 * eps
    assert "model.embed_tokens" not in fa.init(
        fa.LoRA(rank=2), model, generator=torch.Generator().manual_seed(0)
    )


def test_peft_s_pissa_leaves_an_embedding_whole(tmp_path):
    class Small(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.emb, self.up = net.emb, nn.Linear(8, 6)

        def forward(self, tokens):
            return self.up(self.emb(tokens))

    model, tokens = Small(net(torch.float32)), torch.tensor([[1, PAD, 7]])
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["emb", "up"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(copy.deepcopy(model), config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    params, method = fa.load_peft(tmp_path, model)
    got, want = fa.bind(model, method)(params, tokens), wrapped(tokens)
    # An SVD of W, its residual, and two products of a dozen terms.
    assert error(got, want) <= 128 * torch.finfo(torch.float32).eps


def test_the_bases_and_the_lower_dtypes():
    model = net(torch.bfloat16)
    for path in KINDS:
        layer = model.get_submodule(path)
        base = fa.base_of(layer)
        assert base.state()["weight"].data_ptr() == layer.weight.data_ptr()
        assert torch.equal(base.dequantize(), layer.weight.flatten(1))
        assert base.dequantize().shape == (base.out_features, base.in_features)
        assert torch.equal(base.rows(slice(1, 2)).dequantize(), layer.weight[1:2].flatten(1))
        again = base.requantize(base.dequantize(torch.float32))
        assert torch.equal(again.state()["weight"], layer.weight)
        assert {k: t.shape for k, t in base.state().items()} == {
            k: t.shape for k, t in layer.state_dict().items()
        }
    method = replace(METHOD, targets=KINDS)
    params, x = adapter(method, model), inputs().bfloat16()
    assert all(t.dtype == torch.float32 for t in tree_leaves(params))
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    forward = fa.bind(model, method)
    assert torch.equal(forward(fresh, x), forward(None, x))
    wide = model.double()
    state = fa.merge(net(torch.bfloat16), params, method)
    exact = fa.merge(wide, tree_map(Tensor.double, params), method)
    for name, weight in state.items():
        assert weight.dtype == torch.bfloat16
        # Half a step of bfloat16 at the value, and float32's rounding of the sum.
        bound = exact[name].abs() * 2**-8 * 1.01 + 1e-6
        assert ((weight.double() - exact[name]).abs() <= bound).all()


def test_what_passes_to_peft_and_what_does_not(tmp_path):
    for kwargs in ({"dilation": (1, 2)}, {"mode": "reflect"}):
        model = net(**kwargs)
        method = replace(METHOD, targets=["two"])
        c, params = by_hand(model, method), adapter(method, model)
        x = inputs()
        forward = fa.bind(model, method)
        assert error(forward(params, x), c(params, x)) <= EPS
        assert error(fa.merged_model(model, params, method)(x), c(params, x)) <= EPS
        with pytest.raises(CheckpointError, match=r"dilation .* and padding_mode"):
            fa.save_peft(tmp_path / "new", params, method, model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", [fa.DoRA(rank=2), fa.OFT(block_size=2)])
@pytest.mark.parametrize("path", ["emb", "two"])
def test_dora_and_oft_say_that_they_are_for_linear_layers(method, path):
    method, model = replace(method, targets=[path]), net()
    for call in (lambda: fa.bind(model, method), lambda: fa.init(method, model)):
        with pytest.raises(ConfigError, match=f"'{path}' is a.* adapts linear layers alone"):
            call()


def test_refusals():
    model, g = net(), torch.Generator().manual_seed(0)
    for layer, words in (
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm=1.0: its forward writes"),
        (nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Conv1d(4, 4, 1, groups=2), "groups=2"),
        (type("Odd", (nn.Conv1d,), {"forward": lambda self, x: x})(4, 4, 1), "of its own"),
        (type("Odd", (nn.Embedding,), {"forward": lambda self, x: x})(4, 4), "of its own"),
    ):
        with pytest.raises(UnsupportedLayerError, match=f"layer 'a': .*{words}"):
            fa.bind(nn.ModuleDict({"a": layer}), fa.LoRA(rank=2, targets=["a"]))
    with pytest.raises(ConfigError, match="'emb': lora_bias=True"):
        fa.bind(model, replace(METHOD, lora_bias=True))
    with pytest.raises(ConfigError, match="a convolution takes kaiming or gaussian"):
        fa.init(replace(METHOD, init="orthogonal"), model, generator=g)
    with pytest.raises(ConfigError, match="to='int8': layer 'one' is a Conv, which stays dense"):
        fa.merged_model(model, adapter(METHOD, model), METHOD, to="int8")
    params = adapter(METHOD, model)
    swapped = params | {"two": fa.LoRAParams(params["two"].lora_A[0], params["two"].lora_B)}
    with pytest.raises(AdapterError, match=r"lora_A \[r, 1, 2, 3\] and lora_B \[2, r\]"):
        fa.bind(model, METHOD)(swapped, torch.zeros(1, 16, dtype=F64))
    swapped = params | {"emb": fa.LoRAParams(*params["emb"])}
    with pytest.raises(AdapterError, match="expected a LoRAEmbeddingParams"):
        fa.bind(model, METHOD)(swapped, torch.zeros(1, 16, dtype=F64))
