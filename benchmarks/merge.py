"""Merging a LoRA adapter into an int8 layer, fadapt beside PEFT: time, peak extra memory, and the
error of the weight after cycles of merging and unmerging; then, for int8, INC FP8 and AQLM, what
each way of merging keeps of an adapter on the small shipped model (see merge_table.py).

    python benchmarks/merge.py           # 4096 x 4096 for time and memory, 256 x 256 for drift

PEFT merges into a model that ``quantize_`` made only when it is told the config again; so it is.
Memory is the peak of the process above where the merge began, each in a process of its own; the new
layer's 16 MiB are in it.
"""

import argparse
import subprocess
import sys
import time
import warnings

import torch
from merge_memory import peak_kib, reset_peak
from merge_table import tables
from peft import LoraConfig, get_peft_model
from timing import machine
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa

CYCLES = (1, 10, 100)
RANK = 8


def case(width: int, share: float) -> tuple[nn.Module, dict[str, fa.LoRAParams], fa.LoRA]:
    """A layer, and an adapter whose update has ``share`` of the weight's norm."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("l", nn.Linear(width, width, bias=False).requires_grad_(False))
    norm = model.l.weight.norm()
    quantize_(model, Int8WeightOnlyConfig())
    method = fa.LoRA(rank=RANK)
    A, B = torch.randn(RANK, width), torch.randn(width, RANK)
    return model, {"l": fa.LoRAParams(A, B * (share * norm / (B @ A).norm()))}, method


def peft_model(model: nn.Module, params: dict[str, fa.LoRAParams]):
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["l"]))
    layer = wrapped.base_model.model.l
    layer.get_apply_tensor_subclass = Int8WeightOnlyConfig
    layer.lora_A["default"].weight.data = params["l"].lora_A
    layer.lora_B["default"].weight.data = params["l"].lora_B
    return layer


def measure(side: str, width: int) -> None:
    """Print milliseconds and MiB of one side's merge."""
    model, params, method = case(width, 0.05)
    small, small_params, _ = case(64, 0.05)  # loads what is loaded on first use
    if side == "PEFT":
        peft_model(small, small_params).merge()
        layer = peft_model(model, params)
        run = layer.merge
    else:
        fa.merge(small, small_params, method)

        def run() -> object:
            return fa.merge(model, params, method)

    before = reset_peak()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    print(seconds * 1e3, (peak_kib() - before) / 1024)
    del result


def drift(share: float) -> dict[str, list[float]]:
    model, params, method = case(256, share)
    first = model.l.weight.dequantize()

    def error(weight: Tensor) -> float:
        return float((weight - first).norm() / first.norm())

    found: dict[str, list[float]] = {"fadapt": [], "fadapt, undo": [], "PEFT": []}
    for name in ("fadapt", "fadapt, undo"):
        now = model
        for cycle in range(1, max(CYCLES) + 1):
            merged, record = fa.merged_model(now, params, method, undo=True)
            undo = record if "undo" in name else None
            state = fa.unmerge(merged, params, method, undo=undo)
            now = nn.Sequential()
            now.add_module("l", nn.Linear(256, 256, bias=False, device="meta"))
            now.l.weight = nn.Parameter(state["l.weight"], requires_grad=False)
            if cycle in CYCLES:
                found[name].append(error(now.l.weight.dequantize()))
    layer = peft_model(model, params)
    for cycle in range(1, max(CYCLES) + 1):
        layer.merge()
        layer.unmerge()
        if cycle in CYCLES:
            found["PEFT"].append(error(layer.get_base_layer().weight.dequantize()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--side", choices=["PEFT", "fadapt"], help="print one side's numbers")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.side:
        measure(args.side, args.width)
        return
    print(machine("cpu"))
    print(f"one int8 layer of {args.width} x {args.width}, float32, rank {RANK}")
    both = {}
    for side in ("PEFT", "fadapt"):
        command = [sys.executable, "-W", "ignore", __file__, "--side", side]
        command += ["--width", str(args.width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        both[side] = [float(word) for word in done.stdout.split()]
        print(f"{side:<14} {both[side][0]:>8.0f} ms {both[side][1]:>8.1f} MiB")
    ratios = [
        a / b if b else float("inf") for a, b in zip(both["PEFT"], both["fadapt"], strict=True)
    ]
    print(f"{'PEFT / fadapt':<14} {ratios[0]:>8.2f}x   {ratios[1]:>8.2f}x")
    for share in (0.05, 0.01):
        print(f"error of W after {CYCLES} cycles, an update of {share:.0%} of W:")
        for name, errors in drift(share).items():
            print(f"{name:<14} " + " ".join(f"{error:>9.4%}" for error in errors))
    tables(["int8", "inc-fp8", "aqlm"], "html", 100)


if __name__ == "__main__":
    main()
