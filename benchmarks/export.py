"""An exported graph beside eager mode: its size, how its logits differ, and a step with a KV cache.

python benchmarks/export.py [--formats .pt2 .onnx .aoti.pt2] [--past 64]
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from timing import machine, medians
from torch.utils._pytree import tree_map
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import LlamaConfig, LlamaForCausalLM

import fadapt as fa
from fadapt.export_cache import with_cache

BASES = {
    "dense": None,
    "int8": Int8WeightOnlyConfig(),
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
}
LAYERS, ROWS, ADAPTERS = 4, 8, 8


def make(base: str) -> tuple[torch.nn.Module, fa.Bank]:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if BASES[base] is not None:
        quantize_(model.model, BASES[base])
    method, g = fa.LoRA(rank=16), torch.Generator().manual_seed(0)
    adapters = {}
    for k in range(ADAPTERS):
        fresh = fa.init(method, model, generator=g)
        adapters[f"a{k}"] = (
            tree_map(lambda t: t + 0.02 * torch.randn(t.shape, generator=g), fresh),
            method,
        )
    return model, fa.Bank.holding(model, adapters)


def step(past: int) -> dict[str, torch.Tensor]:
    """One token a row, after ``past`` of them."""
    g = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1024, (ROWS, 1), generator=g),
        "attention_mask": torch.ones(ROWS, past + 1, dtype=torch.int64),
        "position_ids": torch.full((ROWS, 1), past),
    }
    for n in range(LAYERS):
        for part in ("key", "value"):
            name = f"past_key_values.{n}.{part}"
            inputs[name] = torch.randn(ROWS, 4, past, 64, generator=g)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=[".pt2", ".onnx", ".aoti.pt2"])
    parser.add_argument("--past", type=int, default=64)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(machine("cpu"))
    print(f"Llama, {LAYERS} layers of 512, {ROWS} rows, {ADAPTERS} adapters of rank 16, one token")
    print("base          format     export s     MiB   largest difference   step / eager's")
    inputs = step(args.past)
    for base in BASES:
        model, bank = make(base)
        names = ["base", *bank.names[: ROWS - 1]]
        mixed, ids = fa.bind_mixed(model, bank.method), bank.ids(names)
        rows = mixed.rows(ids, bank.params)

        def eager(mixed=mixed, bank=bank, rows=rows):
            return with_cache(lambda **given: mixed(bank.params, rows, **given), dict(inputs))

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for kind in args.formats:
                path, start = Path(folder) / f"graph{kind}", time.perf_counter()
                fa.export(model, bank.method, path, bank=bank, kv_cache=True)
                took, run = time.perf_counter() - start, fa.load_export(path)

                def graph(run=run, names=names, bank=bank):
                    return run(names, inputs, bank)

                want, got = eager()[0], graph()[0]
                off = ((got - want).abs().max() / want.abs().max()).item()
                same = int((got.argmax(-1) == want.argmax(-1)).sum())
                taken = medians({"eager": eager, "graph": graph}, "cpu")
                size, ratio = path.stat().st_size / 2**20, taken["graph"] / taken["eager"]
                print(
                    f"{base:13} {kind:10} {took:8.1f} {size:7.1f}   {off:.1e}, "
                    f"{same} of {ROWS} tokens   {ratio:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
