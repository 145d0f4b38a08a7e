"""One training step of K LoRA adapters on one frozen int8 base: fadapt's batched step, PEFT's loop
over adapters, and the base's own forward and backward over the same tokens.

    python benchmarks/train_many.py                    # CPU, 4 layers of 1024 x 1024, float32
    python benchmarks/train_many.py --dtype bfloat16
    python benchmarks/train_many.py --device cuda      # 4 layers of 4096 x 4096, bfloat16
"""

import argparse
import copy

import torch
from peft import LoraConfig, get_peft_model
from timing import machine, medians
from torch import nn
from torch.utils._pytree import tree_map
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa


def base_model(width: int, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {f"l{i}": nn.Linear(width, width, bias=False) for i in range(4)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model = model.to(device, dtype).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def peft_loop(model: nn.Module, k: int, rank: int, xs: torch.Tensor, kind: torch.dtype):
    names = [f"a{i}" for i in range(k)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["l0", "l1", "l2", "l3"])
    wrapped = get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(kind)

    def step() -> None:
        for name, x in zip(names, xs, strict=True):
            wrapped.set_adapter(name)
            wrapped(x).float().square().mean().backward()
        wrapped.zero_grad()

    return step


def fadapt_steps(model: nn.Module, k: int, rank: int, xs: torch.Tensor, kind: torch.dtype):
    """One step in both of fadapt's forms: a mapped forward, and a mixed batch in which adapter k
    has the k-th rows. The first runs any model; the second, any whose rows stay apart."""
    method = fa.LoRA(rank=rank, dtype=kind)
    generator = torch.Generator().manual_seed(0)
    many = fa.stack([fa.init(method, model, generator=generator) for _ in range(k)])
    forward, mixed = fa.bind(model, method), fa.bind_mixed(model, method)
    if k == 1:  # one adapter needs neither
        one, x = tree_map(lambda t: t[0], many), xs[0]
        step_one = fa.value_and_grad(lambda p: forward(p, x).float().square().mean())
        steps = {"vmap": lambda: step_one(one), "mixed": lambda: step_one(one)}
        if x.is_cuda:
            graph_one = fa.cuda_graph(step_one, one)
            steps["graph"] = lambda: graph_one(one)
        return steps
    mapped = fa.value_and_grad(lambda p, x: forward(p, x).float().square().mean(), in_dims=(0, 0))
    rows = mixed.rows(range(k), many)
    joined = fa.value_and_grad(
        lambda p, x: mixed(p, rows, x).float().square().flatten(1).mean(1).sum()
    )
    steps = {"vmap": lambda: mapped(many, xs), "mixed": lambda: joined(many, xs)}
    if xs.is_cuda:
        graph = fa.cuda_graph(joined, many, xs)
        steps["graph"] = lambda: graph(many, xs)
    return steps


def floor(model: nn.Module, xs: torch.Tensor):
    forward = fa.bind(model, fa.LoRA())
    rows = xs.flatten(0, 1)
    step = fa.value_and_grad(lambda x: forward(None, x).float().square().mean())
    return lambda: step(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int)
    parser.add_argument("--tokens", type=int, help="tokens an adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="of base and activations")
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    width = args.width or (4096 if on_gpu else 1024)
    tokens = args.tokens or (64 if on_gpu else 16)
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    kind = getattr(torch, args.adapter_dtype)
    print(machine(args.device))
    print(
        f"4 int8 layers of {width} x {width}, {dtype}, rank {args.rank} in {kind}, {tokens} tokens"
    )
    ours = ["vmap", "mixed", *(["graph"] if on_gpu else [])]
    names = ["PEFT loop", *ours, "base alone"]
    names += [f"PEFT/{n}" for n in ours] + [f"{n}/base" for n in ours]
    print(f"{'K':>4} " + " ".join(f"{name:>12}" for name in names))
    model = base_model(width, dtype, args.device)
    for k in args.k:
        generator = torch.Generator(args.device).manual_seed(k)
        shape = (k, tokens, width)
        xs = torch.randn(shape, generator=generator, device=args.device).to(dtype)
        t = medians(
            {
                "peft": peft_loop(model, k, args.rank, xs, kind),
                **fadapt_steps(model, k, args.rank, xs, kind),
                "base": floor(model, xs),
            },
            args.device,
        )
        milliseconds = " ".join(f"{seconds * 1e3:>9.2f} ms" for seconds in t.values())
        ratios = [t["peft"] / t[n] for n in ours] + [t[n] / t["base"] for n in ours]
        print(f"{k:>4} {milliseconds} " + " ".join(f"{ratio:>11.2f}x" for ratio in ratios))


if __name__ == "__main__":
    main()
