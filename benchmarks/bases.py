"""Every base beside its vendor's own layer on a CPU: forward, forward + backward, and 16 adapters
under ``vmap`` beside 16 calls (LoRA, rank 16).

    python benchmarks/bases.py                  # 1024 x 1024, 64 rows
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, medians
from torch import Tensor, nn
from torch.func import vmap
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import fadapt as fa

K = 16


def dense(width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, width).to(dtype).requires_grad_(False)


def torchao(config: object) -> Callable[[int], nn.Module]:
    def make(width: int) -> nn.Module:
        layer = dense(width)
        quantize_(layer, config)
        return layer

    return make


def inc(width: int) -> nn.Module:
    from neural_compressor.torch.quantization import FP8Config, convert, prepare

    with tempfile.TemporaryDirectory() as folder:
        config = FP8Config(
            use_qdq=True,
            scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2",
            hp_dtype="fp32",
            observer="maxabs",
            dump_stats_path=f"{folder}/stats",
        )
        model = prepare(nn.Sequential(dense(width)), config)
        with torch.no_grad():
            model(torch.randn(64, width))
        return convert(model)[0]


def aqlm(width: int) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from aqlm_layers import quantized

    return quantized((1, 16, 8, 1), width, width)


BASES = {
    "dense": dense,
    "int8": torchao(Int8WeightOnlyConfig()),
    "int8 dynamic": torchao(Int8DynamicActivationInt8WeightConfig()),
    "float8": torchao(Float8WeightOnlyConfig()),
    "int4 group 32": torchao(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "inc fp8": inc,
    "aqlm 1x16": aqlm,
}


def both(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def step() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(run(leaf).square().sum(), leaf)

    return step


def refused(step: Callable[[], object]) -> bool:
    try:
        step()
    except Exception:  # vendors raise of every kind
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side of a ratio")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(machine("cpu"))
    print(f"{args.width} x {args.width}, {args.rows} rows, float32; vendor's time over ours")
    print(f"{'base':<16} {'forward':>10} {'+ backward':>12} {'16 calls / vmap':>16}")
    x = torch.randn(args.rows, args.width)
    for name, make in BASES.items():
        layer = make(args.width)
        base = fa.base_of(layer)
        sides: dict[str, Callable[[], object]] = {
            "ours": lambda b=base: b.linear(x),
            "theirs": lambda layer=layer: layer(x),
            "ours both": both(base.linear, x),
        }
        fails = refused(both(layer, x))
        if not fails:
            sides["theirs both"] = both(layer, x)
        method = fa.LoRA(rank=16, init="gaussian")
        g = torch.Generator().manual_seed(0)
        adapters = [fa.init(method, layer, generator=g) for _ in range(K)]
        many, forward = fa.stack(adapters), fa.bind(layer, method)
        mapped = vmap(forward, in_dims=(0, None))
        sides["vmap"] = lambda f=mapped, m=many: f(m, x)
        sides["calls"] = lambda f=forward, a=adapters: [f(p, x) for p in a]
        with torch.no_grad():
            inference = {k: v for k, v in sides.items() if "both" not in k}
            t = medians(inference, "cpu", args.seconds)
        t |= medians({k: v for k, v in sides.items() if "both" in k}, "cpu", args.seconds)
        backward = "it raises" if fails else f"{t['theirs both'] / t['ours both']:.2f}x"
        print(
            f"{name:<16} {t['theirs'] / t['ours']:>9.2f}x {backward:>12} "
            f"{t['calls'] / t['vmap']:>15.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
