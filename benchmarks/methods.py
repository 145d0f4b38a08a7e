"""One training step (forward, backward) of LoRA, DoRA and OFT: fadapt against PEFT, as ratios.

    python benchmarks/methods.py                       # CPU, 4 layers of 1024 x 1024, float32
    python benchmarks/methods.py --base int8
    python benchmarks/methods.py --device cuda         # 4 layers of 4096 x 4096, bfloat16
    python benchmarks/methods.py --only oft-64-exact   # some of the rows

Four jobs: a step of 512 tokens; one of 32 tokens, of an adapter that fadapt has prepared before (R
for OFT, norms for DoRA); a step of 8 micro-batches of 32 tokens, with all that it takes to prepare
once and to bring the gradients back once; and a step of K = 16 adapters of 32 tokens each, where
PEFT loops over them. PEFT's OFT refuses a model that torchao's quantize_
made int8: there its side is left out, and fadapt's is set against the base's own step. On a GPU
fadapt's step is also captured as a CUDA graph (fadapt.cuda_graph).
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from timing import machine, medians
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa

LAYERS = ["l0", "l1", "l2", "l3"]
K, MICRO, MICRO_TOKENS = 16, 8, 32


def base_model(width: int, base: str, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in LAYERS:
        model.add_module(name, nn.Linear(width, width, bias=False))
    model = model.to(device, dtype).requires_grad_(False)
    if base == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    return model


def rows(rank: int) -> dict[str, tuple[fa.Method, Any]]:
    found: dict[str, tuple[fa.Method, Any]] = {
        "lora": (
            fa.LoRA(rank=rank, init="gaussian"),
            LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS),
        ),
        "dora": (
            fa.DoRA(rank=rank, init="gaussian"),
            LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=LAYERS),
        ),
    }
    for size in (32, 64, 128):
        for cayley in ("exact", "neumann"):
            found[f"oft-{size}-{cayley}"] = (
                fa.OFT(block_size=size, cayley=cayley),
                OFTConfig(
                    oft_block_size=size,
                    use_cayley_neumann=cayley == "neumann",
                    target_modules=LAYERS,
                ),
            )
    return found


def peft_step(model: nn.Module, config: Any, xs: torch.Tensor, k: int) -> Callable[[], None]:
    """A step over ``xs [batches, tokens, width]``: batch i for adapter i modulo k."""
    names = [f"a{i}" for i in range(k)]
    wrapped = get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    wrapped.train()

    def step() -> None:
        for i, x in enumerate(xs):
            if k > 1:
                wrapped.set_adapter(names[i % k])
            wrapped(x).float().square().mean().backward()
        wrapped.zero_grad()

    return step


def fadapt_step(model: nn.Module, method: fa.Method, xs: torch.Tensor, job: str):
    forward = fa.bind(model, method)
    g = torch.Generator().manual_seed(0)

    def loss(p: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(p, x).float().square().mean()

    def moved() -> Any:
        # Not fresh: the exact form of OFT takes fewer steps for a rotation by nothing.
        fresh = fa.init(method, model, generator=g)
        return tree_map(lambda t: t + (0.02 * torch.randn(t.shape, generator=g)).to(t), fresh)

    run = fa.value_and_grad(loss)
    if job == "adapters":
        many = fa.stack([moved() for _ in range(K)])
        batched = torch.func.vmap(loss)
        step = fa.value_and_grad(lambda p: batched(p, xs).sum())
        return step, many
    params = moved()
    if job == "step":
        return lambda p: run(p, xs[0]), params
    if job == "prepared":
        return lambda p: run(p, xs[0]), forward.prepare(params)

    def micro(params: Any) -> Any:
        prepared, back = fa.vjp(forward.prepare, params)
        total, spec = tree_flatten(run(prepared, xs[0])[1])
        for x in xs[1:]:
            torch._foreach_add_(total, tree_flatten(run(prepared, x)[1])[0])
        return back(tree_unflatten(total, spec))

    return micro, params


def floor(model: nn.Module, xs: torch.Tensor):
    forward = fa.bind(model, fa.LoRA())
    step = fa.value_and_grad(lambda x: forward(None, x).float().square().mean())
    flat = xs.flatten(0, 1)
    return lambda: step(flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--base", default="dense", choices=["dense", "int8"])
    parser.add_argument("--width", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="of base and activations; adapters are float32")
    parser.add_argument("--only", nargs="+", help="rows, as they are named in the table")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side of a ratio")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    width = args.width or (4096 if on_gpu else 1024)
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
    print(machine(args.device))
    print(f"4 {args.base} layers of {width} x {width}, {dtype}, adapters in float32")
    print(
        f"{'method':<16} {'job':<24} {'PEFT':>11} {'fadapt':>11} {'base alone':>11} "
        f"{'PEFT/fadapt':>12} {'fadapt/base':>12}"
        + (f" {'graph':>11} {'PEFT/graph':>12}" if on_gpu else "")
    )
    model = base_model(width, args.base, dtype, args.device)
    jobs = {
        "step": (1, 512, "512 tokens"),
        "prepared": (1, MICRO_TOKENS, f"{MICRO_TOKENS} tokens, prepared"),
        "micro": (MICRO, MICRO_TOKENS, f"{MICRO} x {MICRO_TOKENS}, prepared"),
        "adapters": (K, 32, f"K = {K} x 32 tokens"),
    }
    for name, (method, config) in rows(args.rank).items():
        if args.only and name not in args.only:
            continue
        for job, (batches, tokens, words) in jobs.items():
            generator = torch.Generator(args.device).manual_seed(0)
            shape = (batches, tokens, width)
            xs = torch.randn(shape, generator=generator, device=args.device).to(dtype)
            step, params = fadapt_step(model, method, xs, job)
            sides = {"fadapt": partial(step, params), "base": floor(model, xs)}
            if on_gpu:
                sides["graph"] = partial(fa.cuda_graph(step, params), params)
            if not (args.base == "int8" and isinstance(method, fa.OFT)):
                sides["peft"] = peft_step(model, config, xs, K if job == "adapters" else 1)
            t = medians(sides, args.device, args.seconds)
            peft = f"{t['peft'] * 1e3:>8.2f} ms" if "peft" in t else f"{'refused':>11}"
            ratio = f"{t['peft'] / t['fadapt']:>11.2f}x" if "peft" in t else f"{'':>12}"
            graph = ""
            if on_gpu:
                graph = f" {t['graph'] * 1e3:>8.2f} ms"
                graph += f" {t['peft'] / t['graph']:>11.2f}x" if "peft" in t else ""
            print(
                f"{name:<16} {words:<24} {peft} {t['fadapt'] * 1e3:>8.2f} ms "
                f"{t['base'] * 1e3:>8.2f} ms {ratio} {t['fadapt'] / t['base']:>11.2f}x{graph}",
                flush=True,
            )


if __name__ == "__main__":
    main()
