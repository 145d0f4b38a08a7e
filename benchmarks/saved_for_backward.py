"""Bytes that one LoRA layer over an int8 weight keeps for its backward: fadapt's and PEFT's.

python benchmarks/saved_for_backward.py
"""

import argparse
import warnings

import torch
from peft import LoraConfig, get_peft_model
from saved import saved_bytes
from timing import machine
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT: merging needs a config; nothing is merged here
    print(machine("cpu"))
    print(f"one int8 layer of {args.width} x {args.width}, rank {args.rank}, float32")
    print(f"{'tokens':>8} {'PEFT':>12} {'fadapt':>12} {'fadapt/PEFT':>12}")
    model = nn.Sequential()
    model.add_module("l", nn.Linear(args.width, args.width, bias=False))
    quantize_(model.requires_grad_(False), Int8WeightOnlyConfig())
    method = fa.LoRA(rank=args.rank)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params = tree_map(lambda t: t.requires_grad_(), params)
    assert all(leaf.requires_grad for leaf in tree_leaves(params))
    forward = fa.bind(model, method)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["l"])
    wrapped = get_peft_model(model, config)
    for tokens in (16, 128, 512):
        x = torch.randn(tokens, args.width, requires_grad=True)
        theirs = saved_bytes(lambda x=x: wrapped(x))
        ours = saved_bytes(lambda x=x: forward(params, x))
        print(f"{tokens:>8} {theirs:>10} B {ours:>10} B {ours / theirs:>11.2f}x")


if __name__ == "__main__":
    main()
