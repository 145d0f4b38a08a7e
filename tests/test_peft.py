"""PEFT's checkpoints both ways, with PEFT itself as the oracle."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
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


def assert_both_ways(model, config, tmp_path, share=TOLERANCE):
    """PEFT saves, fadapt loads; fadapt saves, PEFT loads: one function throughout."""
    wrapped = peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    params, method = fa.load_peft(tmp_path / "theirs", model)
    want = out(wrapped)
    assert (want - out(model)).abs().max() > 1e-2 * want.abs().max()  # the adapter does something
    assert_same(fa.bind(model, method)(params, IDS).logits, want, share)

    fa.save_peft(tmp_path / "ours", params, method, model)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert_same(out(again), want, share)
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
