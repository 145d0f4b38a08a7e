"""One AQLM layer: fadapt's product against AQLM's own layer, forward and forward + backward.

python benchmarks/aqlm_layer.py [--device cuda] [--width 1024] [--seconds 2]

AQLM's layer is measured as its users meet it: after its first forward, which permutes the codes of
256-entry codebooks on a CPU. There its backward is wrong (see tests/test_aqlm.py), and raises where
the group counts differ; "dequantize" is the other side then: its own dequantize_gemm, done once for
all rows and differentiated by autograd. fadapt is measured over a fresh layer and a used one. On a
CPU AQLM's kernel gives right results with one thread alone, so all sides run on one.
"""

import argparse
import os
import warnings
from functools import partial
from itertools import product

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from aqlm import QuantizedLinear
from aqlm.inference_kernels.dequantization import dequantize_gemm
from timing import machine, medians
from torch import Tensor

import fadapt as fa

COLUMNS = ("AQLM", "dequantize", "fadapt", "used")
FORMATS = {"1x16": (1, 16), "2x8": (2, 8), "1x8": (1, 8)}


def layer(fmt: str, width: int, device: str, dtype: torch.dtype) -> QuantizedLinear:
    books, bits = FORMATS[fmt]
    one = QuantizedLinear(width, width, 8, 1, books, bits, bias=False, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    one.codes.data = torch.randint(-half, half, one.codes.shape, generator=g).to(one.codes)
    one.codebooks.data = torch.randn(one.codebooks.shape, generator=g).to(dtype)
    one.scales.data = (torch.rand(one.scales.shape, generator=g) / width**0.5).to(dtype)
    return one.to(device)


def dequantize_gemm_of(base, x: Tensor) -> Tensor:
    return dequantize_gemm(x, base.codes, base.codebooks, base.scales, None)


def forward(run, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(x)


def both(run, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = run(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def repeat(count: int, call, run, x: Tensor) -> None:
    for _ in range(count):
        call(run, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    print(machine(args.device))
    print(f"{args.width} x {args.width}, groups of 8, {dtype}; milliseconds, and AQLM's over ours")
    print(" " * 28 + "".join(f"{name:>12}" for name in COLUMNS) + "   ratio")
    for fmt in args.formats:
        theirs = layer(fmt, args.width, args.device, dtype)
        fresh = fa.base_of(layer(fmt, args.width, args.device, dtype))
        with torch.no_grad():
            theirs(torch.zeros(1, args.width, device=args.device, dtype=dtype))
        used = fa.base_of(theirs)
        exact = fresh.dequantize(torch.float64).to(args.device)
        dense = partial(dequantize_gemm_of, fresh)
        for rows, backward in product(args.rows, (False, True)):
            x = torch.randn(rows, args.width, device=args.device, dtype=dtype)
            far = (fresh.linear(x).double() - x.double() @ exact.mT).abs().max().item()
            assert far < 100 * torch.finfo(dtype).eps, far
            layers = {
                "AQLM": theirs,
                "dequantize": dense,
                "fadapt": fresh.linear,
                "used": used.linear,
            }
            if backward and args.device == "cpu":
                del layers["AQLM"]
            call = both if backward else forward
            # Each side several times in its turn: what ran before has emptied the caches.
            count = max(1, 16 // rows)
            sides = {k: partial(repeat, count, call, f, x) for k, f in layers.items()}
            times = medians(sides, args.device, args.seconds)
            times = {k: t / count for k, t in times.items()}
            shown = {k: f"{1e3 * t:.3f}" for k, t in times.items()}
            ours = max(times.pop("fadapt"), times.pop("used"))
            name = f"{fmt} {rows:>3} {'forward + backward' if backward else 'forward'}"
            cells = "".join(f"{shown.get(k, '-'):>12}" for k in COLUMNS)
            print(f"{name:28}{cells}{min(times.values()) / ours:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
