"""An adapter trained here is served by other engines: its folder by vLLM, a graph by ONNX Runtime.

vLLM: its rules as of 0.32, read from ``vllm/lora/peft_helper.py`` (options, scaling), ``utils.py``
(keys) and ``lora_model.py`` (files, layers) beside it, and ``vllm/config/lora.py`` (ranks). vLLM
itself wants an older transformers than fadapt, so it has no place in fadapt's own environment:
``FADAPT_TEST_VLLM=/path/to/python pytest tests/test_serving_recipe.py`` runs it in another.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import randomized
from safetensors.torch import load_file
from small_lm import make_model, make_texts
from transformers import LlamaForCausalLM

import fadapt as fa
from fadapt import cli
from fadapt.merge_folder import merge_folder
from fadapt.models import SHIPPED, load_model

# Linear layers of vLLM's Llama; qkv_proj and gate_up_proj take the parts that they are packed of.
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SCRIPTS = Path(__file__).parent.parent / "benchmarks"
LARGEST = 16  # vLLM's default for max_lora_rank
SERVED = {
    "lora": fa.LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"]),
    "rslora": fa.LoRA(rank=3, alpha=6, rslora=True, init="gaussian"),
    "patterns": fa.LoRA(rank=4, alpha=6, targets=["q_proj", "down_proj"],
                        rank_pattern={"down_proj": 2}, alpha_pattern={"0.*q_proj": 3}),
}  # fmt: skip
REFUSED = {
    "dora": (fa.DoRA(rank=2, targets=["q_proj"]), "use_dora"),
    "oft": (fa.OFT(block_size=4, targets=["o_proj"]), "lora_alpha"),
    "bias": (fa.LoRA(rank=2, targets=["q_proj"], lora_bias=True), "lora_bias"),
    "saved": (fa.LoRA(rank=2, targets=["q_proj"], modules_to_save=["model.norm"]), "modules_to"),
    "pissa": (fa.LoRA(rank=2, targets=["q_proj"], init="pissa"), "init"),
    "wide": (fa.LoRA(rank=24, targets=["q_proj"]), "rank 24"),
}


def by_vllms_rules(folder):
    """``{layer: scaling B A}`` as vLLM reads a folder; ValueError if it does not, and why."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in config:
            raise ValueError(f"{name} is missing")
    for name in ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens",
                 "layer_replication", "use_bdlora", "use_qalora"):  # fmt: skip
        if config.get(name):
            raise ValueError(f"{name} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError("bias is not supported")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        raise ValueError(f"init_lora_weights={init}")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if (largest := max([config["r"], *ranks.values()])) > LARGEST:
        raise ValueError(f"rank {largest} is greater than {LARGEST}")

    def own(pattern, path, default):
        hits = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path))
        return next(hits, default)

    parts = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        if not found:
            raise ValueError(f"{key} is no weight of a LoRA")
        if found[1].rsplit(".", 1)[-1] not in LAYERS:
            raise ValueError(f"{found[1]} is no layer that wears adapters")
        parts[found[1], found[2]] = tensor
    deltas = {}
    for path in dict.fromkeys(path for path, _ in parts):
        a, b = parts[path, "lora_A"], parts[path, "lora_B"]
        rank, alpha = own(ranks, path, config["r"]), own(alphas, path, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank
        deltas[path] = (alpha / (math.sqrt(rank) if config["use_rslora"] else rank)) * b @ a
    return deltas


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lm") / "model")


def adapter(method, model, seed=0):
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(seed))
    return randomized(fresh, seed)


def logits(model, folder, tokens):
    """What an engine that reads the folder by those rules computes."""
    state = dict(model.state_dict())
    for path, delta in by_vllms_rules(folder).items():
        state[f"{path}.weight"] = state[f"{path}.weight"] + delta
    return torch.func.functional_call(model, state, (tokens,), tie_weights=False).logits


def close(got, want):
    # float32, sums in another order through two blocks
    return torch.allclose(got, want, rtol=0, atol=64 * 2**-23 * want.abs().max().item())


TOKENS = torch.randint(1, 1536, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_a_saved_folder_means_the_same_by_vllms_rules(lm, tmp_path, name):
    model, method = LlamaForCausalLM.from_pretrained(lm).eval(), SERVED[name]
    params = adapter(method, model)
    fa.save_peft(tmp_path / "a", params, method, model)
    want = fa.bind(model, method)(params, TOKENS).logits
    assert close(logits(model, tmp_path / "a", TOKENS), want)
    assert not close(model(TOKENS).logits, want)


def test_what_a_sweep_leaves_is_served(lm, tmp_path):
    out = tmp_path / "run"
    small = "--steps 2 --batch 1 --length 8 --rank 2 3 --lr 0.02 --targets q_proj,up_proj"
    texts = make_texts(tmp_path / "texts")
    words = ["sweep", "--model", str(lm), "--data", str(texts), "--out", str(out), *small.split()]
    assert cli.main(words) == 0
    folders = sorted((out / "adapters").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert {p.rsplit(".", 1)[-1] for p in by_vllms_rules(folder)} == {"q_proj", "up_proj"}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_vllm_does_not_take_has_another_way(lm, tmp_path, name):
    model, (method, reason) = LlamaForCausalLM.from_pretrained(lm).eval(), REFUSED[name]
    state = None
    if name == "pissa":
        params, state = fa.init(method, model)
        params = randomized(params, 0)
    else:
        params = adapter(method, model)
    want = fa.bind(model, method, state)(params, TOKENS).logits
    fa.save_peft(tmp_path / "a", params, method, model)
    with pytest.raises(ValueError, match=reason):
        by_vllms_rules(tmp_path / "a")
    if name == "pissa":  # what is read is plain LoRA
        fa.save_peft(tmp_path / "plain", *fa.load_peft(tmp_path / "a", model), model)
        assert close(logits(model, tmp_path / "plain", TOKENS), want)
    elif name not in ("saved", "bias"):  # merged, the model is served as any other
        merge_folder(lm, [tmp_path / "a"], tmp_path / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert close(merged(TOKENS).logits, want)


def lines_of(done):
    """The JSON lines of a process's output, in which there may be others."""
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return lines


def bare(environment):
    """Without what points to fadapt."""
    return {name: value for name, value in environment.items() if name != "PYTHONPATH"}


# ONNX's exporter and its optimiser, about themselves.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_runtime_alone_gives_the_tokens_that_fadapt_generate_gives(lm, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(lm).eval()
    flags = ["--model", str(lm), "--base", "int8"]
    worn = {"lora": SERVED["patterns"], "dora": REFUSED["dora"][0], "oft": REFUSED["oft"][0]}
    for k, (name, method) in enumerate(worn.items()):
        fa.save_peft(tmp_path / name, adapter(method, model, k), method, model)
        flags += ["--adapter", f"{name}={tmp_path / name}"]
    texts = ("import", "def read(self, path):", "<p>The")
    prompts = [json.dumps({"adapter": n, "prompt": t}) for t in texts for n in ("base", *worn)]
    file, graph = tmp_path / "p.jsonl", tmp_path / "graph.onnx"
    file.write_text("\n".join(prompts))
    assert cli.main(["export", *flags, "--kv-cache", "--out", str(graph)]) == 0
    capsys.readouterr()
    assert cli.main(["generate", *flags, "--prompts", str(file), "--max-new-tokens", "7"]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    command = [sys.executable, SCRIPTS / "serve_onnx.py", graph, lm, file]
    done = subprocess.run(
        command, env=bare(os.environ), capture_output=True, text=True, check=False
    )
    keys = ("adapter", "prompt", "text", "tokens")
    theirs = [tuple(line[key] for key in keys) for line in lines_of(done)]
    assert theirs == [tuple(line[key] for key in keys) for line in ours]
    assert len({tuple(line["tokens"]) for line in ours}) > 6  # the base has three


@pytest.mark.skipif(
    "FADAPT_TEST_VLLM" not in os.environ, reason="FADAPT_TEST_VLLM names no Python with vLLM"
)
def test_vllm_itself_gives_each_prompt_the_tokens_that_fadapt_generate_gives(tmp_path, capsys):
    model, prompts, words = load_model(SHIPPED / "model", "dense"), [], []
    for k, (name, method) in enumerate(SERVED.items()):
        params = fa.init(method, model, generator=torch.Generator().manual_seed(k))
        g = torch.Generator().manual_seed(k)  # small enough to stay a language model
        params = torch.utils._pytree.tree_map(
            lambda t, g=g: 0.6 * t + 0.12 * torch.randn(t.shape, generator=g), params
        )
        fa.save_peft(tmp_path / name, params, method, model)
        words.append(f"{name}={tmp_path / name}")
    for text in ("import", "def read(self, path):", "<p>The"):
        prompts += [json.dumps({"adapter": n, "prompt": text}) for n in ("base", *SERVED)]
    (tmp_path / "p.jsonl").write_text("\n".join(prompts))
    flags = [part for word in words for part in ("--adapter", word)]
    given = ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "7"]
    assert cli.main(["generate", *flags, *given]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    command = [SCRIPTS / "serve_vllm.py", SHIPPED / "model", tmp_path / "p.jsonl", *words]
    done = subprocess.run(
        [os.environ["FADAPT_TEST_VLLM"], *command],
        env=bare(os.environ) | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    theirs = lines_of(done)
    assert len(theirs) == len(ours) == 12
    for one, other in zip(ours, theirs, strict=True):
        assert (one["adapter"], one["prompt"]) == (other["adapter"], other["prompt"])
        assert one["tokens"] == other["tokens"]
    assert len({tuple(line["tokens"]) for line in ours}) > 9
