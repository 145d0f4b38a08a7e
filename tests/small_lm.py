"""A folder with a causal LM of two small layers, and adapters of it, for the commands' tests."""

import shutil
from pathlib import Path

import torch
from cases import randomized
from transformers import LlamaConfig, LlamaForCausalLM

import fadapt as fa
from fadapt.models import SHIPPED


def make_model(folder: Path, layers: int = 2) -> Path:
    """Random weights, and the tokenizer of the shipped model."""
    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "model" / name, folder)
    return folder


def make_adapters(root: Path, methods: dict[str, fa.LoRA | fa.OFT]) -> list[str]:
    """A folder of each below ``root``, beside the model's; returns the words that name them all."""
    model = LlamaForCausalLM.from_pretrained(make_model(root / "model"))
    words = ["--model", str(root / "model")]
    for k, (name, method) in enumerate(methods.items()):
        params = fa.init(method, model, generator=torch.Generator().manual_seed(k))
        fa.save_peft(root / name, randomized(params, k), method, model)
        words += ["--adapter", f"{name}={root / name}"]
    return words


def make_texts(folder: Path, characters: int = 2000) -> Path:
    """Two short texts: one as .txt, one as .jsonl."""
    folder.mkdir()
    first = (SHIPPED / "texts" / "python.txt").read_text("utf-8")[:characters]
    (folder / "python.txt").write_text(first, "utf-8")
    (folder / "words.jsonl").write_text('{"text": "to be or not to be"}\n' * 12, "utf-8")
    return folder
