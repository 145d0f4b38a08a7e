"""Every base beside its vendor's own layer: forward, forward + backward, and 16 adapters under
``vmap`` beside 16 calls (LoRA, rank 16); and the MiB that each keeps between forward and backward,
since a vendor's layer that keeps a float W need not make it again.

    python benchmarks/bases.py                  # 1024 x 1024, 64 rows, on a CPU
    python benchmarks/bases.py --device cuda --dtype bfloat16 --width 4096 --rows 1 64 512
    python benchmarks/bases.py --device cuda --dtype bfloat16 --width 4096 --graph

In eager mode a GPU mostly waits for Python, and timings are Python's; with ``--graph`` each side is
replayed as a CUDA graph, and timings are the GPU's.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from saved import saved_bytes
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


def dense(width: int, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, width).to(device, dtype).requires_grad_(False)


def torchao(config: object) -> Callable[[int, torch.dtype, str], nn.Module]:
    def make(width: int, dtype: torch.dtype, device: str) -> nn.Module:
        layer = dense(width, dtype, device)
        quantize_(layer, config)
        return layer

    return make


def inc(width: int, dtype: torch.dtype, device: str) -> nn.Module:
    from neural_compressor.torch.quantization import FP8Config, convert, prepare

    with tempfile.TemporaryDirectory() as folder:
        config = FP8Config(
            use_qdq=True,
            scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2",
            hp_dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
            observer="maxabs",
            dump_stats_path=f"{folder}/stats",
        )
        model = prepare(nn.Sequential(dense(width, dtype, device)), config)
        with torch.no_grad():
            model(torch.randn(64, width, dtype=dtype))
        return convert(model)[0]


def aqlm(*fmt: int) -> Callable[[int, torch.dtype, str], nn.Module]:
    def make(width: int, dtype: torch.dtype, device: str) -> nn.Module:
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        from aqlm_layers import quantized

        return quantized(fmt, width, width, dtype).to(device)

    return make


BASES = {
    "dense": dense,
    "int8": torchao(Int8WeightOnlyConfig()),
    "int8 dynamic": torchao(Int8DynamicActivationInt8WeightConfig()),
    "float8": torchao(Float8WeightOnlyConfig()),
    "int4 group 32": torchao(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "inc fp8": inc,
    "aqlm 1x16": aqlm(1, 16, 8, 1),
    "aqlm 2x8": aqlm(2, 8, 8, 1),
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


def graphed(run: Callable[[], object]) -> Callable[[], object] | None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # torchao's product of int8, which asks the host
        return None
    return graph.replay


def measure(
    layer: nn.Module, x: Tensor, device: str, seconds: float, graph: bool
) -> dict[str, float]:
    """The seconds of each side; a vendor's that raises has none."""
    base = fa.base_of(layer)
    method = fa.LoRA(rank=16, init="gaussian")
    g = torch.Generator().manual_seed(0)
    adapters = [fa.init(method, layer, generator=g) for _ in range(K)]
    many, forward = fa.stack(adapters), fa.bind(layer, method)
    mapped = vmap(forward, in_dims=(0, None))

    def timed(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
        sides = {name: run for name, run in sides.items() if not refused(run)}
        if graph:
            replays = {name: graphed(run) for name, run in sides.items()}
            sides = {name: run for name, run in replays.items() if run is not None}
        return medians(sides, device, seconds)

    with torch.no_grad():
        t = timed(
            {
                "ours": lambda: base.linear(x),
                "theirs": lambda: layer(x),
                "vmap": lambda: mapped(many, x),
                "calls": lambda: [forward(p, x) for p in adapters],
            }
        )
    return t | timed({"ours both": both(base.linear, x), "theirs both": both(layer, x)})


def kept(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    leaf = x.detach().requires_grad_()
    return saved_bytes(lambda: run(leaf)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[64])
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side of a ratio")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dtype = getattr(torch, args.dtype)
    print(machine(args.device))
    print(f"{args.width} x {args.width}, {args.dtype}; ours in ms, and the vendor's time over ours")
    print(
        f"{'base':<16} {'rows':>5} {'forward':>17} {'+ backward':>17} {'16 calls / vmap':>16} "
        f"{'kept MiB, theirs':>17}"
    )
    for name in args.bases:
        if name == "inc fp8" and args.device != "cpu":  # INC's layer runs on CPUs and Gaudi alone
            continue
        layer = BASES[name](args.width, dtype, args.device)
        for rows in args.rows:
            x = torch.randn(rows, args.width, dtype=dtype, device=args.device)
            t = measure(layer, x, args.device, args.seconds, args.graph)
            cells = [
                f"{1e3 * t[ours]:>8.3f} "
                + (f"{t[theirs] / t[ours]:>7.2f}x" if theirs in t else "raises".rjust(8))
                for ours, theirs in (("ours", "theirs"), ("ours both", "theirs both"))
            ]
            theirs = f"{kept(layer, x):.2f}" if "theirs both" in t else "raises"
            print(
                f"{name:<16} {rows:>5} {cells[0]} {cells[1]} {t['calls'] / t['vmap']:>15.2f}x "
                f"{kept(fa.base_of(layer).linear, x):>9.2f} {theirs:>7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
