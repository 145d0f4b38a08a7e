"""Peak extra memory of merging into an int8 layer of 4096 x 4096, by method, granularity and
rounding; and of ``fadapt merge`` on a folder: how little of the model it holds.

    python benchmarks/merge_memory.py
    python benchmarks/merge_memory.py --folder 10x2048   # a model larger than its memory: 1.3 GiB

Each line is a process of its own: MiB at the peak (VmHWM, all that is resident) above where the
merge began, and that less the new weight (codes and scales). The factor of X^T X that ``feedback``
takes lies in a temporary file, which is in neither. Of folders, what is counted is anonymous
memory; and ``--folder`` limits it (RLIMIT_DATA) to what the process has before it, and some more.
"""

import argparse
import gc
import resource
import shutil
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
ROUNDINGS = ("nearest", "search", "stochastic", "feedback")
LINES = [
    *((m, g, r) for r in ROUNDINGS for m in METHODS for g in GRANULARITIES),
    *((m, g, "unmerge") for m in ("lora", "oft") for g in GRANULARITIES),
]
EXTRA = 64  # MiB that --folder lets a merge have beyond what the process had


def status_kib(name: str) -> int:
    """A line of this process's status: VmHWM is the most memory since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def peak_kib() -> int:
    return status_kib("VmHWM")


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
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(f"{root}/model", max_shard_size="200MB")
    method = fa.LoRA(rank=RANK, targets="all-linear", exclude=["lm_head"])
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    fa.save_peft(f"{root}/adapter", fresh, method)
    print(sum(f.stat().st_size for f in Path(root, "model").glob("*.safetensors")) / 2**20)


def stream(to: str, *sizes: str, extra: int | None = None) -> None:
    """Merge folders, the first to load what is loaded on first use; print the last one's MiB, and
    its peak of anonymous memory: pages of the mapped files, which the kernel may drop at any time,
    are not in it. With ``extra`` the last merge may have that many MiB more than the process has;
    that limit is printed too, and the whole peak."""
    from fadapt.merge_folder import merge_folder

    limit = 0
    for size in sizes:
        with tempfile.TemporaryDirectory() as root:
            # By another process: what making the model freed would be used again here.
            command = [sys.executable, "-W", "ignore", __file__, "--write", root, size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            written = float(done.stdout.split()[-1])
            gc.collect()
            most, over = [0], threading.Event()
            before = status_kib("RssAnon")

            def watch(most: list[int] = most, over: threading.Event = over) -> None:
                while not over.is_set():
                    most[0] = max(most[0], status_kib("RssAnon"))
                    time.sleep(0.002)

            thread = threading.Thread(target=watch)
            thread.start()
            if extra is not None and size == sizes[-1]:
                limit = status_kib("VmData") // 1024 + extra
                resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20, limit * 2**20))
            model, adapter, out = (Path(root, name) for name in ("model", "adapter", "out"))
            try:
                merge_folder(model, [adapter], out, to=None if to == "-" else to)
            finally:
                over.set()
                thread.join()
    print(written, (most[0] - before) / 1024, most[0] / 1024, limit)


def larger_than_memory(size: str, to: str) -> None:
    """Print what a merge of a folder took, in a process that could not have held the model."""
    layers, width = map(int, size.split("x"))
    needed, free = layers * 16 * width**2 * 2 * 2.2, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        sys.exit(f"{tempfile.gettempdir()} has {free:,} bytes left, {needed:,.0f} are needed.")
    command = [sys.executable, "-W", "ignore", __file__, "--extra", str(EXTRA)]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--stream", to, "1x64", size], capture_output=True, text=True, check=True
    )
    files, peak, whole, limit = map(float, done.stdout.split()[-4:])
    print(
        f"{size:>10} {named(to):12} files {files:.0f} MiB; limit {limit:.0f} MiB of data, of which "
        f"{limit - EXTRA:.0f} were there before; peak {whole:.0f} MiB, {peak:.0f} above where it "
        f"began ({time.monotonic() - start:.0f} s with the writing of the model)",
        flush=True,
    )


def named(to: str) -> str:
    return "as it is" if to == "-" else f"into {to}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--line", nargs=3, help="print one line's numbers")
    parser.add_argument("--repeat", type=int, default=1, help="print the largest of so many runs")
    parser.add_argument("--stream", nargs="+", help="the same of a folder")
    parser.add_argument("--extra", type=int, help="MiB that it may take")
    parser.add_argument("--folder", metavar="LAYERSxWIDTH", help="a model larger than memory")
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
        stream(*args.stream, extra=args.extra)
        return
    print(machine("cpu"))
    if args.folder:
        for to in ("-", "int8"):
            larger_than_memory(args.folder, to)
        return
    print(f"int8 {args.width} x {args.width}:          peak MiB   beyond the output")
    for line in LINES:
        command = [sys.executable, "-W", "ignore", __file__, "--width", str(args.width), "--line"]
        peak = beyond = 0.0
        for _ in range(args.repeat):
            done = subprocess.run([*command, *line], capture_output=True, text=True, check=True)
            found = map(float, done.stdout.split()[-2:])
            peak, beyond = (max(*pair) for pair in zip((peak, beyond), found, strict=True))
        print(f"{' '.join(line):28}{peak:>10.1f}{beyond:>12.1f}", flush=True)
    print("fadapt merge of a folder, bfloat16, layers x width:     files MiB   peak MiB")
    for to in ("-", "int8"):
        for size in ("3x1024", "12x1024", "24x1024"):
            command = [sys.executable, "-W", "ignore", __file__, "--stream", to, "1x64", size]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            files, peak, *_ = map(float, done.stdout.split()[-4:])
            print(f"{size:>10} {named(to):28}{files:>16.0f}{peak:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
