"""The KV cache in a graph: greedy tokens equal to those of fadapt.generate, in every format."""

import zipfile

import numpy as np
import onnx
import pytest
import torch
from cases import randomized
from test_export import CONFIGS, assert_pure
from torchao.quantization import quantize_
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transforms import error

import fadapt as fa
from fadapt import check_export, export, load_export
from fadapt.export_manifest import read_manifest, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "initializer_range": 0.3,
}
NEW = 6
OFT = fa.OFT(block_size=8, targets=["o_proj", "down_proj"])


def lm(kind, config, base):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if base == "half":  # attention int8, what is after it dense
        for layer in model.model.layers:
            quantize_(layer.self_attn, CONFIGS["int8"])
    return model


def bank_of(model, names, rank, seed):
    """LoRAs of ragged ranks, and an OFT, each of an int8 and of a dense layer if both are there."""
    g = torch.Generator().manual_seed(seed)
    adapters = {}
    for k, name in enumerate(names):
        ragged = fa.LoRA(rank=max(1, rank - k % 2), targets=["up_proj", "q_proj"][k % 2 :])
        method = OFT if name.startswith("oft") else ragged
        adapters[name] = randomized(fa.init(method, model, generator=g), seed + k), method
    return fa.Bank.holding(model, adapters)


def prompts():
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, :3] = mask[2, :1] = 0
    g = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 64, mask.shape, generator=g) * mask,
        "attention_mask": mask,
    }


def greedy(run, ids, inputs, bank, past):
    """One call for the prompt, and one a token, by the cache alone."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    found = []
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        step = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits, *present = run(ids, step | past, bank)
        past = dict(zip(past, present, strict=True))
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(tokens)], -1)
        found.append(tokens)
    return torch.cat(found, -1)


def empty_past(model, rows):
    config = model.config
    shape = (rows, config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads)
    layers = range(config.num_hidden_layers)
    names = [f"past_key_values.{n}.{p}" for n in layers for p in ("key", "value")]
    return {name: torch.zeros(shape) for name in names}


def check(model, run, names, bank, inputs):
    """The tokens of generate; and in two calls, the second of one token, the numbers of eager."""
    want = fa.generate(model, bank, names, **inputs, max_new_tokens=NEW, do_sample=False)
    past = empty_past(model, len(names))
    got = greedy(run, names, inputs, bank, past)
    assert torch.equal(got, want[:, -NEW:])
    mixed, ids, cache = fa.bind_mixed(model, bank.method), bank.ids(names), DynamicCache()
    mask, bound = inputs["attention_mask"], 64 * torch.finfo(torch.float32).eps
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    steps = [
        {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": place},
        {
            "input_ids": got[:, :1],
            "attention_mask": torch.cat([mask, mask[:, -1:]], -1),
            "position_ids": place[:, -1:] + 1,
        },
    ]
    for step in steps:
        want = mixed(bank.params, ids, **step, past_key_values=cache, use_cache=True).logits
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        logits, *present = run(names, step | past, bank)
        # Padding sees nothing, and what comes of that is of no meaning.
        real = step["attention_mask"].bool()
        seen, new = [[t.transpose(1, 2)[real] for t in kv] for kv in (present, held)]
        real = real[:, -logits.shape[1] :]
        assert error([logits[real], *seen], [want[real], *new]) <= bound
        past = dict(zip(past, present, strict=True))
    return got


# Torch takes long to trace a graph, whatever its layers are: int8 and dense ones are in the same,
# each kind under a LoRA and under an OFT.
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".aoti.pt2"])
def test_greedy_tokens_are_those_of_generate(tmp_path, suffix):
    # A package's C++ takes long to compile: of one layer.
    layers = 1 if suffix == ".aoti.pt2" else 2
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers})
    model = lm(LlamaForCausalLM, config, "half")
    bank = bank_of(model, ["a", "b", "oft"], 3, 0)
    path = tmp_path / f"graph{suffix}"
    assert_pure(
        lambda: export(model, bank.method, path, bank=bank, kv_cache=True), model, bank.params
    )
    run = load_export(path)
    first = check(model, run, ["b", "base", "oft", "a"], bank, prompts())
    bare = check(model, run, ["base"] * 4, bank, prompts())
    same = [torch.equal(a, b) for a, b in zip(first, bare, strict=True)]
    assert same[1:] == [True, False, False]  # the first row's adapter is the smallest
    # Other adapters, of other numbers and ranks; one adapter of rank 1; one prompt of one token.
    other = bank_of(model, ["c", "d", "e", "f", "oft1", "oft2"], 6, 20)
    check(model, run, ["f", "oft2", "base", "c"], other, prompts())
    one = bank_of(model, ["x", "oft"], 1, 40)
    check(model, run, ["x"], one, {name: t[:1, :1] for name, t in prompts().items()})
    about = read_manifest(path)
    assert about["ids"] == {"base": -1, "a": 0, "b": 1, "oft": 2}
    assert about["outputs"][:3] == ["logits", "present.0.key", "present.0.value"]
    check_export(path, model, bank.method)
    if suffix == ".aoti.pt2":
        with zipfile.ZipFile(path) as package:
            data = b"".join(map(package.read, package.namelist()))
        weights = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
        int8 = [p for n, p in weights.items() if "self_attn" in n]
        assert (len(int8), len(weights)) == (4, 7)
        for weight in int8:
            assert weight.qdata.numpy().tobytes() in data
            assert weight.dequantize().numpy().tobytes() not in data
        write_manifest(path, about | {"torch": "2.1.0"})
        with pytest.raises(
            fa.errors.CheckpointError, match=r"compiled by torch 2\.1\.0, and this is"
        ):
            load_export(path)
    if suffix == ".onnx":
        graph = onnx.load(path).graph
        assert [i.name for i in graph.input] == about["inputs"]
        assert [o.name for o in graph.output] == about["outputs"]
        past = next(i for i in graph.input if i.name == "past_key_values.1.value")
        dims = [d.dim_param or d.dim_value for d in past.type.tensor_type.shape.dim]
        assert dims == ["batch", 1, "past", 16]
        int8 = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
        assert len(int8) == 8  # of fourteen: those of attention
        assert all(np.prod(i.dims) >= 16 * 32 for i in int8)


def test_a_window_of_attention_is_in_the_mask_and_every_token_in_the_cache(tmp_path):
    config = MistralConfig(**SIZES, sliding_window=4)
    model = lm(MistralForCausalLM, config, "dense")
    bank, path = bank_of(model, ["a"], 2, 0), tmp_path / "graph.pt2"
    export(model, bank.method, path, bank=bank, kv_cache=True, bake=True)
    names = ["a", "base", "a", "a"]
    want = fa.generate(model, bank, names, **prompts(), max_new_tokens=NEW, do_sample=False)
    got = greedy(load_export(path), names, prompts(), None, empty_past(model, 4))
    assert torch.equal(got, want[:, -NEW:])


def test_what_has_no_such_cache_is_refused(tmp_path):
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    mamba = lm(MambaForCausalLM, config, "dense")
    method = fa.LoRA(rank=2, targets=["in_proj"])
    bank = fa.stack([fa.init(method, mamba, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(fa.errors.ConfigError, match=r"MambaForCausalLM keeps LinearAttentionLayer"):
        export(mamba, method, tmp_path / "g.pt2", bank=bank, kv_cache=True)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    bank = fa.stack([fa.init(fa.LoRA(), plain, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(fa.errors.ConfigError, match="no causal LM"):
        export(plain, fa.LoRA(), tmp_path / "g.pt2", bank=bank, kv_cache=True)
    assert not list(tmp_path.iterdir())
