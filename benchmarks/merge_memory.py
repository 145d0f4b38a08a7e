"""Peak extra memory of merging into an int8 layer of 4096 x 4096, by method and rounding; and of
``fadapt merge`` on a folder: how little of the model it holds.

    python benchmarks/merge_memory.py

Each line is a process of its own: MiB at the peak above where the merge began, and that less the
new weight (codes and scales). ``feedback`` alone holds square matrices of the width of the inputs.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, PerTensor, quantize_

import fadapt as fa

RANK = 8
METHODS = {"lora": fa.LoRA(rank=RANK), "dora": fa.DoRA(rank=RANK), "oft": fa.OFT(block_size=32)}
GRANULARITIES = {"row": PerRow(), "group": PerGroup(128), "tensor": PerTensor()}
LINES = [
    *((m, g, "nearest") for m in METHODS for g in GRANULARITIES),
    ("lora", "row", "search"),
    ("lora", "tensor", "search"),
    ("lora", "row", "stochastic"),
    ("lora", "row", "unmerge"),
    ("lora", "row", "feedback"),
]


def peak_kib() -> int:
    """The most memory that this process has had, since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_kib()


def case(width: int, method: Any, granularity: str) -> tuple[nn.Module, Any]:
    """An int8 layer, and an adapter with a small random change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width, bias=False).requires_grad_(False))
    quantize_(model, Int8WeightOnlyConfig(granularity=GRANULARITIES[granularity]))
    g = torch.Generator().manual_seed(0)
    params = fa.init(method, model, generator=g)
    leaf = params["0"]
    moved = {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in leaf._asdict().items()}
    return model, {"0": type(leaf)(**moved)}


def measure(width: int, name: str, granularity: str, rounding: str) -> None:
    """Print the peak, and the peak less the new weight, in MiB."""
    method = METHODS[name]
    for size in (256, width):  # the first loads what is loaded on first use
        model, params = case(size, method, granularity)
        options: dict[str, Any] = {}
        if rounding == "unmerge":
            model = fa.merged_model(model, params, method)
        else:
            options["rounding"] = rounding
        if rounding == "feedback":
            options["moments"] = {"0": torch.eye(size)}
        if rounding == "stochastic":
            options["generator"] = torch.Generator().manual_seed(0)
        gc.collect()
        before = reset_peak()
        run = fa.unmerge if rounding == "unmerge" else fa.merge
        state = run(model, params, method, **options)
        peak = (peak_kib() - before) / 1024
    weight = state["0.weight"]
    output = (weight.qdata.numel() + 4 * weight.scale.numel()) / 2**20
    print(peak, peak - output)


def folder(root: str, size: str) -> None:
    """Write a random bfloat16 model and an adapter; print the MiB of the model's files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = map(int, size.split("x"))

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=1024,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(f"{root}/model", max_shard_size="200MB")
    method = fa.LoRA(rank=RANK, targets="all-linear", exclude=["lm_head"])
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    fa.save_peft(f"{root}/adapter", fresh, method)
    print(sum(f.stat().st_size for f in Path(root, "model").glob("*.safetensors")) / 2**20)


def stream(to: str, *sizes: str) -> None:
    """Merge folders, the first to load what is loaded on first use; print the last one's MiB, and
    its peak of anonymous memory: pages of the mapped files, which the kernel may drop at any time,
    are not in it."""
    from fadapt.merge_folder import merge_folder

    for size in sizes:
        with tempfile.TemporaryDirectory() as root:
            # By another process: what making the model freed would be used again here.
            command = [sys.executable, "-W", "ignore", __file__, "--write", root, size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            written = float(done.stdout.split()[-1])
            gc.collect()
            most, over = [0], threading.Event()
            before = anonymous_kib()

            def watch(most: list[int] = most, over: threading.Event = over) -> None:
                while not over.is_set():
                    most[0] = max(most[0], anonymous_kib())
                    time.sleep(0.002)

            thread = threading.Thread(target=watch)
            thread.start()
            model, adapter, out = (Path(root, name) for name in ("model", "adapter", "out"))
            merge_folder(model, [adapter], out, to=None if to == "-" else to)
            over.set()
            thread.join()
    print(written, (most[0] - before) / 1024)


def anonymous_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--line", nargs=3, help="print one line's numbers")
    parser.add_argument("--stream", nargs="+", help="the same of a folder")
    parser.add_argument("--write", nargs=2, help="make that folder")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.line:
        measure(args.width, *args.line)
        return
    if args.write:
        folder(*args.write)
        return
    if args.stream:
        stream(*args.stream)
        return
    print(machine("cpu"))
    print(f"int8 {args.width} x {args.width}:          peak MiB   beyond the output")
    for line in LINES:
        command = [sys.executable, "-W", "ignore", __file__, "--width", str(args.width), "--line"]
        done = subprocess.run([*command, *line], capture_output=True, text=True, check=True)
        peak, beyond = map(float, done.stdout.split()[-2:])
        print(f"{' '.join(line):28}{peak:>10.1f}{beyond:>12.1f}", flush=True)
    print("fadapt merge of a folder, bfloat16, layers x width:     files MiB   peak MiB")
    for to in ("-", "int8"):
        for size in ("3x1024", "12x1024", "24x1024"):
            command = [sys.executable, "-W", "ignore", __file__, "--stream", to, "1x64", size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            files, peak = map(float, done.stdout.split()[-2:])
            kind = "as it is" if to == "-" else f"into {to}"
            print(f"{size:>10} {kind:28}{files:>16.0f}{peak:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
