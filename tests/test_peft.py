"""PEFT's checkpoints both ways, with PEFT itself as the oracle."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import randomized
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure
from torchao.quantization import Int8WeightOnlyConfig, PerRow, quantize_
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fadapt as fa

pytestmark = [
    # PEFT reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT on a model quantized by plain quantize_: it could not merge. Nothing is merged here.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
    # A lora_B.bias is one-dimensional, which PEFT's check for sharded tensors takes for a fault.
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),
]

IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 6]])
EPS = torch.finfo(torch.float32).eps
# Two computations of one function in float32: each of some dozen sums over 16 to 32 products is
# rounded in its own order. 32 roundings, relative to the largest output.
TOLERANCE = 32 * EPS


def llama(base="dense", **kwargs):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,  # so that attention is not uniform
        mlp_bias=True,
        attention_bias=True,
        **kwargs,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    if base == "int8":
        quantize_(model.model.layers, Int8WeightOnlyConfig(granularity=PerRow()))
    return model


def gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
        )
        return GPT2LMHeadModel(config).eval()


def peft_model(model, config, seed=0):
    """PEFT around a copy of ``model``, every parameter that it trains moved at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


def assert_same(got, want, share=TOLERANCE):
    torch.testing.assert_close(got, want, rtol=0, atol=share * want.abs().max().item())


def out(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def assert_both_ways(model, config, tmp_path, ids=IDS):
    """PEFT saves, fadapt loads; fadapt saves, PEFT loads: one function throughout."""
    wrapped = peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    params, method = fa.load_peft(tmp_path / "theirs", model)
    want = out(wrapped, ids)
    assert (want - out(model, ids)).abs().max() > 1e-2 * want.abs().max()
    assert_same(fa.bind(model, method)(params, ids).logits, want)

    fa.save_peft(tmp_path / "ours", params, method, model)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_same(out(again, ids), want)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    return params, method


CONFIGS = {
    "list": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "regex": {"target_modules": r".*layers\.1\..*\.(gate|down)_proj"},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.25},
    "exclude": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"},
    "rslora": {"target_modules": ["up_proj"], "use_rslora": True, "lora_alpha": 3},
    "bias": {"target_modules": ["up_proj"], "lora_bias": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {"up_proj": 10},
    },
    "blocks": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "whole path": {
        "target_modules": ["model.layers.0.mlp.up_proj", "v_proj"],
        "layers_to_transform": 1,
    },
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", ["dense", "int8"])
def test_both_ways(name, base, tmp_path):
    if (name, base) == ("bias", "int8"):
        with pytest.raises(ValueError, match="lora_bias"):  # PEFT has none on torchao: no oracle
            peft_model(llama(base), LoraConfig(**CONFIGS[name]))
        return
    assert_both_ways(llama(base), LoraConfig(r=4, **CONFIGS[name]), tmp_path)


def test_conv1d(tmp_path):
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert_both_ways(gpt2(), config, tmp_path)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"]


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_saved_modules_of_tied_weights(saved, tmp_path):
    model = llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # PEFT: the weights are tied
        params, _ = assert_both_ways(model, config, tmp_path)
    assert {p.rsplit(".", 1)[-1] for p in params} == {"q_proj", *saved}
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Norms(nn.Module):
    """Layers with buffers, and a name that ends another name."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Linear(6, 6)
            self.norm = nn.BatchNorm1d(6)
            self.head, self.overhead = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return SimpleNamespace(logits=self.overhead(self.head(self.norm(self.body(x)))))


X = torch.linspace(-1, 1, 18).reshape(3, 6)


def test_saved_modules_with_buffers(tmp_path):
    model = Norms().eval()
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm"])
    params, _ = assert_both_ways(model, config, tmp_path, ids=X)
    assert set(params["norm"]) == {"weight", "bias"}  # running statistics are no parameters
    other = Norms().eval()
    other.norm.running_mean += 1
    with pytest.raises(fa.errors.CheckpointError, match="running_mean"):
        fa.load_peft(tmp_path / "theirs", other)


def test_modules_to_save_is_an_ending_even_within_a_word(tmp_path):
    model = Norms().eval()
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "absent"])
    wrapped = peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    params, method = fa.load_peft(tmp_path, model)
    assert set(method.modules_to_save) == {"head", "overhead"}
    assert_same(fa.bind(model, method)(params, X).logits, wrapped(X).logits.detach())
    method = replace(method, modules_to_save=["head"])
    params = {p: leaf for p, leaf in params.items() if p != "overhead"}
    with pytest.raises(fa.errors.CheckpointError, match="also 'overhead'"):
        fa.save_peft(tmp_path / "again", params, method, model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_relative_to_the_residual(init, rslora, tmp_path):
    # theirs: PEFT moved part of W into the adapter, and does so again when it loads.
    model = llama()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=init,
        use_rslora=rslora,
        **({} if rslora else {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 7}}),
    )
    wrapped = peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    params, method = fa.load_peft(tmp_path / "theirs", model)
    assert (method.rank, method.init) == (6, "kaiming")
    # The residual is W less a part as large as W, rounded twice.
    assert_same(fa.bind(model, method)(params, IDS).logits, out(wrapped), 4 * TOLERANCE)

    # ours: trained from the residual state, saved as PEFT would.
    lora = fa.LoRA(rank=3, alpha=5, targets=["q_proj"], init=init, rslora=rslora)
    params, residual = fa.init(lora, model)
    params = {p: leaf._replace(lora_A=leaf.lora_A + 0.1) for p, leaf in params.items()}
    want = fa.bind(model, lora, state=residual)(params, IDS).logits
    fa.save_peft(tmp_path / "ours", params, lora, model)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_same(out(again), want, 4 * TOLERANCE)
    params, method = fa.load_peft(tmp_path / "ours", model)
    assert_same(fa.bind(model, method)(params, IDS).logits, want, 4 * TOLERANCE)

    with pytest.raises(fa.errors.CheckpointError, match="Int8"):
        fa.load_peft(tmp_path / "ours", llama("int8"))
    with pytest.raises(fa.errors.CheckpointError, match="init='kaiming'"):
        fa.save_peft(tmp_path / "int8", fa.init(lora, llama("int8"))[0], lora, llama("int8"))


def test_a_residual_with_a_learned_bias_is_refused(tmp_path):
    method = fa.LoRA(rank=2, targets=["up_proj"], init="pissa", lora_bias=True)
    params, _ = fa.init(method, llama())
    with pytest.raises(fa.errors.CheckpointError, match="lora_bias"):
        fa.save_peft(tmp_path, params, method)


def test_alpha_that_follows_the_rank(tmp_path):
    model = llama()
    method = fa.LoRA(rank=4, targets=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 0)
    fa.save_peft(tmp_path, params, method)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(out(again), fa.bind(model, method)(params, IDS).logits)


def test_a_learned_bias_whatever_the_initialisation(tmp_path):
    model = llama()
    method = fa.LoRA(rank=2, targets=["up_proj"], lora_bias=True, init="gaussian")
    params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 0)
    fa.save_peft(tmp_path, params, method)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(out(again), fa.bind(model, method)(params, IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype, tmp_path):
    model = llama().to(dtype)
    method = fa.LoRA(rank=2, targets=["q_proj"], modules_to_save=["norm"], dtype=dtype)
    params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 0)
    fa.save_peft(tmp_path, params, method)
    again, loaded = fa.load_peft(tmp_path, model)
    assert loaded.dtype == dtype
    assert tree_structure(again) == tree_structure(params)
    for got, want in zip(tree_leaves(again), tree_leaves(params), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("base", ["dense", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_under_float32_adapters(base, dtype, tmp_path):
    # PEFT, like fadapt, computes the update in the adapter's float32.
    model = llama().to(dtype)
    if base == "int8":
        quantize_(model.model.layers, Int8WeightOnlyConfig(granularity=PerRow()))
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    wrapped = peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    params, method = fa.load_peft(tmp_path, model)
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(params))
    got, want = fa.bind(model, method)(params, IDS).logits, out(wrapped)
    assert got.dtype == dtype
    # Some dozen roundings to the base's dtype follow one another through two blocks, and here or
    # there one of them falls the other way.
    assert_same(got, want, 8 * torch.finfo(dtype).eps)


def test_a_low_precision_adapter_made_float32_is_what_peft_computes(tmp_path):
    model = llama()
    method = fa.LoRA(rank=2, targets=["q_proj", "up_proj"], dtype=torch.bfloat16)
    params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 0)
    fa.save_peft(tmp_path, params, method)
    want = out(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval())
    forward = fa.bind(model, method)
    assert_same(forward(tree_map(torch.Tensor.float, params), IDS).logits, want)
    # Computed in its own dtype, the update is rounded to it some dozen times.
    assert_same(forward(params, IDS).logits, want, 8 * torch.finfo(torch.bfloat16).eps)


PATHS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@settings(max_examples=25, deadline=None)
@given(
    method=st.builds(
        fa.LoRA,
        rank=st.integers(1, 4),
        alpha=st.one_of(st.none(), st.integers(1, 9), st.floats(0.5, 9)),
        targets=st.one_of(
            st.lists(st.sampled_from(PATHS), min_size=2, unique=True).map(
                lambda t: [*t, "up_proj"]
            ),
            st.just(r".*\.layers\.\d\.(mlp\.up|self_attn\.k)_proj"),
            st.just("all-linear"),
        ),
        exclude=st.sampled_from([[], ["layers.0.self_attn.v_proj"], r".*1\.self_attn\.k_proj"]),
        rslora=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        lora_bias=st.booleans(),
        # One key: of two that match, the first counts, and PEFT saves them in another order.
        rank_pattern=st.dictionaries(
            st.sampled_from(["up_proj", "layers.1.mlp.up_proj"]), st.integers(1, 5), max_size=1
        ),
        alpha_pattern=st.dictionaries(st.just(".*up_proj"), st.integers(1, 5)),
        modules_to_save=st.sampled_from([[], ["lm_head"]]),
    ),
    told=st.booleans(),
)
def test_any_configuration_both_ways(tmp_path_factory, method, told):
    model, folder = llama(), tmp_path_factory.mktemp("any")
    try:
        params = randomized(fa.init(method, model, generator=torch.Generator().manual_seed(0)), 1)
    except fa.errors.TargetError:
        assume(False)  # excluded what the targets do not name
    fa.save_peft(folder / "ours", params, method, model if told else None)
    theirs = PeftModel.from_pretrained(model, folder / "ours").eval()
    want = fa.bind(llama(), method)(params, IDS).logits
    assert_same(out(theirs), want)
    theirs.save_pretrained(folder / "theirs")
    again, loaded = fa.load_peft(folder / "theirs", llama())
    assert_same(fa.bind(llama(), loaded)(again, IDS).logits, want)
    assert again.keys() == params.keys()
    for got, leaf in zip(tree_leaves(again), tree_leaves(params), strict=True):
        assert torch.equal(got, leaf)
