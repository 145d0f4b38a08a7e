"""Training biases beside the adapters (``bias=``): entries of the pytree, on every base."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import BASES, N_HIDDEN, N_IN, BaseRow, Case, K, dense, randomized, row, torchao
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_peft import IDS, llama
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map
from transformers import BertConfig, BertForSequenceClassification
from transforms import TRANSFORMS, error, loss, plain_grads

import fadapt as fa
from fadapt.errors import AdapterError, CheckpointError, ConfigError, MergeError
from fadapt.merge_folder import merge_folder
from fadapt.testing import assert_pure

pytestmark = [
    # PEFT's own: it calls a method that transformers renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
F64 = torch.float64
EPS = 32 * torch.finfo(F64).eps  # four layers of 16 products, and the way back


class Net(nn.Module):
    def __init__(self, layer=dense):
        super().__init__()
        self.up, self.norm = layer(16, 8), nn.LayerNorm(8)
        self.down, self.head = layer(8, 8), dense(8, 8)

    def forward(self, x):
        return self.head(self.down(self.norm(self.up(x))).tanh())


def net(layer=dense, dtype=F64):
    model = Net(layer)
    with torch.no_grad():
        model.norm.bias += 0.1
    return model.to(dtype).eval().requires_grad_(False)


METHODS = {
    "lora": fa.LoRA(rank=2, alpha=6, targets=["up", "down"], lora_bias=True),
    "dora": fa.DoRA(rank=2, targets=["up", "down"]),
    "oft": fa.OFT(block_size=4, targets=["up", "down"]),
}
ADAPTED = {"up.base_layer", "down.base_layer"}


def adapter(method, model, seed=0):
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(seed))
    return randomized(fresh, seed)


def inputs(dtype=F64):
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def with_biases(model, params):
    """A copy of the model that has the adapter's biases, and the rest of the adapter."""
    model, rest = copy.deepcopy(model), dict(params)
    for path in params:
        if set(params[path]) == {"bias"} if isinstance(params[path], dict) else False:
            own = model.get_submodule(path.removesuffix(".base_layer")).bias
            own.data.copy_(rest.pop(path)["bias"])
    return model, rest


@pytest.mark.parametrize("kind", ["all", "adapter_only"])
@pytest.mark.parametrize("base", BASES, ids=lambda b: b.name)
def test_on_every_base(base, kind):
    layers = base.layer(N_IN, N_HIDDEN), nn.Tanh(), base.layer(N_HIDDEN, 8)
    model = nn.Sequential(*layers).eval()
    plain = fa.LoRA(rank=2, alpha=6, targets=["0"])
    method = replace(plain, bias=kind)
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    entries = ["0.base_layer"] + ["2"] * (kind == "all")
    assert list(fresh) == ["0", *entries]
    for path, at in zip(entries, ("0", "2"), strict=False):
        own = model.get_submodule(at).bias
        assert torch.equal(fresh[path]["bias"], own)
        assert fresh[path]["bias"].data_ptr() != own.data_ptr()
    forward, x = fa.bind(model, method), inputs(base.dtype)
    assert torch.equal(forward(fresh, x), forward(None, x))

    params = randomized(fresh, 1)
    other, rest = with_biases(model, params)
    y = assert_pure(lambda: forward(params, x), model, params, x)
    assert torch.equal(y, fa.bind(other, plain)(rest, x))
    assert torch.equal(forward(None, x), fa.bind(model, plain)(None, x))
    grads = grad(loss(forward))(params, x)
    # Two layers, and two on the way back, each rounded to the row's dtype; int8's activations
    # step by 1 / 127 at most, but not here: the same bits as in the forward.
    eps = 8 * torch.finfo(base.dtype).eps
    assert error(grads, plain_grads(loss(forward), params, x)[0]) <= eps
    many = fa.stack([params, randomized(fresh, 2)])
    ys = vmap(forward, (0, None))(many, x)
    step = 1 / 127 if base.rounds else 0  # a sum in another order may fall to the next step
    for got, one in zip(ys, fa.unstack(many), strict=True):
        assert error(got, forward(one, x)) <= eps / 2 + step


@pytest.fixture(scope="module")
def whole():
    model, g = net(), torch.Generator().manual_seed(0)
    method = fa.LoRA(rank=2, alpha=6, targets=["up", "down"], bias="all")
    adapters = [adapter(method, model, seed) for seed in range(K)]
    xs = torch.randn(K, 3, 16, generator=g, dtype=F64)
    moves = tree_map(lambda t: torch.randn(t.shape, generator=g, dtype=F64), (adapters[0], xs[0]))

    def reference(params, x):
        state = {}
        for path, leaf in params.items():
            if isinstance(leaf, dict):
                state[f"{path.removesuffix('.base_layer')}.bias"] = leaf["bias"]
            else:
                weight = model.get_submodule(path).weight
                state[f"{path}.weight"] = weight + method.scaling * leaf.lora_B @ leaf.lora_A
        return functional_call(model, state, (x,))

    made = BaseRow("dense", dense, F64), method, model, fa.bind(model, method), reference
    return Case(*made, adapters[0], fa.stack(adapters), xs[0], xs, moves)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform(whole, name):
    c = whole
    got, want, order = TRANSFORMS[name]
    value = assert_pure(lambda: got(c), c.model, c.forward, c.params, c.many, c.x, c.xs)
    assert error(value, want(c)) <= (1, 2, 4)[order] * EPS


@pytest.mark.parametrize("layer", [dense, torchao(row, torch.float32)], ids=["dense", "int8"])
@pytest.mark.parametrize("kind", ["all", "adapter_only"])
@pytest.mark.parametrize("name", METHODS)
def test_merged_and_undone(name, kind, layer):
    dtype = F64 if layer is dense else torch.float32
    model = Net(layer).eval().requires_grad_(False) if layer is not dense else net()
    method = replace(METHODS[name], bias=kind)
    params, x = adapter(method, model), inputs(dtype)
    assert params.keys() - {"up", "down"} == ADAPTED | (
        {"norm", "head"} if kind == "all" else set()
    )
    state, undo = assert_pure(lambda: fa.merge(model, params, method, undo=True), model, params)
    merged = fa.merged_model(model, params, method)
    assert torch.equal(functional_call(model, state, (x,)), merged(x))
    for path in params.keys() - {"up", "down"}:
        bias = params[path]["bias"]
        at = path.removesuffix(".base_layer")
        if at != path and name == "lora":
            bias = bias + params[at].lora_bias * method.scaling
        assert error(state[f"{at}.bias"], bias) <= torch.finfo(dtype).eps
    if layer is dense:
        assert error(merged(x), fa.bind(model, method)(params, x)) <= EPS
    with pytest.raises(MergeError, match=r"trained biases .* Pass undo="):
        fa.unmerge(merged, params, method)
    back = fa.unmerge(merged, params, method, undo=undo)
    assert back.keys() == state.keys()
    assert torch.equal(functional_call(merged, back, (x,)), model(x))
    for key in (k for k in back if k.endswith("bias")):
        assert torch.equal(back[key], model.state_dict()[key])


PEFT = {
    "lora": LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["up", "down"]),
    "dora": LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["up", "down"]),
    "oft": OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["up", "down"]),
}


# PEFT's check for sharded tensors takes a one-dimensional lora_B.bias for a fault.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("saved", [None, ["head"]], ids=["", "saved"])
@pytest.mark.parametrize("kind", ["all", "adapter_only"])
@pytest.mark.parametrize("name", PEFT)
def test_peft_is_the_oracle(name, kind, saved, tmp_path):
    config = copy.deepcopy(PEFT[name])
    config.bias = kind.replace("adapter", config.peft_type.lower())
    config.modules_to_save = saved
    model, x = net(), inputs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(copy.deepcopy(model), config).double()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "theirs")
    params, method = fa.load_peft(tmp_path / "theirs", model)
    assert method.bias == kind
    forward, want = fa.bind(model, method), wrapped(x)
    assert error(forward(params, x), want) <= EPS
    want.square().mean().backward()
    grads = grad(loss(forward))(params, x)
    biases = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    entries = ADAPTED | ({"norm"} | (set() if saved else {"head"}) if kind == "all" else set())
    for path in entries:
        assert error(grads[path]["bias"], biases[f"base_model.model.{path}.bias"]) <= 2 * EPS

    fa.save_peft(tmp_path / "ours", params, method, model)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").double()
    assert error(again(x), want) <= EPS
    both = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")]
    theirs, ours = both
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    # PEFT writes the biases of a module that is saved whole three times over.
    assert {k for k in theirs.keys() - ours.keys() if "head" not in k} == set()


@pytest.mark.parametrize("kind", ["all", "adapter_only"])
@pytest.mark.parametrize("name", ["llama", "bert", "encoder"])
def test_the_biases_are_those_that_peft_trains(name, kind):
    """Norms' and heads' too; no ``in_proj_bias``, whose name PEFT does not take for a bias."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    bert = BertConfig(vocab_size=16, num_attention_heads=2, max_position_embeddings=8, **small)
    make, targets = {
        "llama": (llama, ["q_proj", "up_proj"]),
        "bert": (lambda: BertForSequenceClassification(bert), ["query", "intermediate.dense"]),
        "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 24), ["linear1"]),
    }[name]
    with torch.random.fork_rng(devices=[]):
        model = make()
        config = LoraConfig(bias=kind.replace("adapter", "lora"), target_modules=targets)
        wrapped = get_peft_model(copy.deepcopy(model), config)
    named = [n for n, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in n]
    theirs = {n.removeprefix("base_model.model.") for n in named}
    method = fa.LoRA(targets=targets, bias=kind)
    params = fa.init(method, model, generator=torch.Generator())
    assert theirs == {f"{path}.bias" for path, leaf in params.items() if isinstance(leaf, dict)}
    assert any("norm" in n.lower() for n in theirs) == (kind == "all" and name != "llama")


def test_stacked_composed_and_compiled():
    model, x = net(), inputs()
    small, large = (fa.LoRA(rank=r, alpha=6, targets=["up", "down"], bias="all") for r in (1, 3))
    a, b = adapter(small, model, 0), adapter(large, model, 1)
    many, unit = fa.stack([a, b], methods=[small, large])
    each = torch.stack([fa.bind(model, small)(a, x), fa.bind(model, large)(b, x)])
    assert error(vmap(fa.bind(model, unit), (0, None))(many, x), each) <= EPS
    for got, want in zip(fa.unstack(many, unit), (a, b), strict=True):
        assert got.keys() == want.keys()
        assert error(got, {path: want[path] for path in got}) <= torch.finfo(F64).eps
    assert fa.count(a) == sum(t.numel() for t in tree_leaves(a))

    plain = METHODS["oft"]
    c = adapter(plain, model, 2)
    chain = fa.bind(model, [large, plain])
    got = chain([b, c], x)
    state = fa.merge(model, [b, c], [large, plain])
    assert error(functional_call(model, state, (x,)), got) <= EPS
    assert torch.equal(chain(None, x), model(x))
    fn = torch.compile(lambda p: chain(p, x), fullgraph=True, backend="aot_eager")
    assert error(fn([b, c]), got) <= EPS
    forward = fa.bind(model, large)
    fn = torch.compile(grad(loss(forward)), fullgraph=True, backend="aot_eager")
    assert error(fn(b, x), grad(loss(forward))(b, x)) <= 2 * EPS
    for call in (
        lambda: fa.bind(model, [small, large])([a, b], x),
        lambda: fa.merge(model, [a, b], [small, large]),
    ):
        with pytest.raises(AdapterError, match="is trained by two of the adapters"):
            call()


def test_a_convolution_s_bias():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Embedding(4, 2)).double()
    method = fa.LoRA(rank=2, targets=["0", "1"], bias="adapter_only")
    params = adapter(method, model)
    assert list(params) == ["0", "1", "0.base_layer"]
    shell = fa.bind(model[0], replace(method, targets=""))
    x = torch.randn(4, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    one = {"": params["0"], "base_layer": params["0.base_layer"]}
    moved = (params["0.base_layer"]["bias"] - model[0].bias)[:, None]
    alone = fa.bind(model[0], fa.LoRA(rank=2, targets=""))({"": params["0"]}, x)
    assert error(shell(one, x), alone + moved) <= EPS
    merged = fa.merged_model(model[0], one, replace(method, targets=""))
    assert error(merged(x), alone + moved) <= EPS


def test_a_folder_is_merged_with_its_biases(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    method = fa.LoRA(rank=2, targets=["q_proj", "embed_tokens"], bias="all")
    params = adapter(method, model)
    assert "model.layers.0.mlp.up_proj" in params  # not adapted, and its bias trained
    fa.save_peft(tmp_path / "adapter", params, method, model)
    merge_folder(tmp_path / "model", [tmp_path / "adapter"], tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    want = fa.merged_model(model, params, method)
    assert torch.equal(again(IDS).logits, want(IDS).logits)
    eps = torch.finfo(torch.float32).eps
    assert error(again(IDS).logits, fa.bind(model, method)(params, IDS).logits) <= 32 * eps


def test_refusals(tmp_path):
    model = net()
    method = replace(METHODS["lora"], bias="all")
    params = adapter(method, model)
    with pytest.raises(ConfigError, match="bias must be one of none, all, adapter_only"):
        fa.LoRA(bias="lora_only")
    for call in (lambda: fa.bind_mixed(model, method), lambda: fa.Bank.of(model, method)):
        with pytest.raises(ConfigError, match="bias"):
            call()
    with pytest.raises(AdapterError, match="combine"):
        fa.combine([params, params], [1, 1], methods=method)
    with pytest.raises(AdapterError, match=r"'norm' is trained itself: expected bias \[8\].*\[7\]"):
        fa.bind(model, method)(params | {"norm": {"bias": torch.zeros(7)}}, inputs())
    with pytest.raises(AdapterError, match="1 missing"):
        fa.bind(model, method)({p: t for p, t in params.items() if p != "norm"}, inputs())
    plain = fa.LoRA(rank=2, targets=["up", "down"])
    with pytest.raises(ConfigError, match="one stack trains the same biases"):
        fa.stack([params, adapter(plain, model)], methods=[method, plain])
    with pytest.raises(CheckpointError, match="not saved"):
        fa.save_peft(tmp_path / "new", {p: params[p] for p in ("up", "down")}, method, model)

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class OwnBase:  # no dataclass
        def __init__(self, layer):
            self.held = fa.Dense(layer.weight.detach(), layer.bias.detach())

        def __getattr__(self, name):
            return getattr(self.__dict__["held"], name)

    fa.register_base(Own, OwnBase)
    with pytest.raises(ConfigError, match="a OwnBase, which cannot hold another bias"):
        fa.bind(Own(4, 3), fa.LoRA(rank=2, bias="adapter_only"))
    model.head.bias = model.down.bias = nn.Parameter(torch.zeros(8))
    with pytest.raises(ConfigError, match="share one bias"):
        fa.bind(model, method)
