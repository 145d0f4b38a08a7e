"""A batch in which every row wears another adapter, through one layer, without gradients: fadapt's
mixed batch, PEFT's ``adapter_names``, plain gather + bmm, and the base alone.

    python benchmarks/mixed_batch.py                    # CPU, 1024 x 1024, float32
    python benchmarks/mixed_batch.py --base int8
    python benchmarks/mixed_batch.py --device cuda      # 4096 x 4096, bfloat16; CUDA graphs as well

Every batch of 32 and 256 rows of 1 and 128 tokens, over 32 and 64 adapters of rank 16, of rank 64,
and ragged (8 to 64, padded to 64).
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from timing import machine, medians
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa

GRAPHS = ["graph", "gather graph", "base graph"]


def base_model(width: int, base: str, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("l", nn.Linear(width, width, bias=False))
    model = model.to(device, dtype).requires_grad_(False)
    if base == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    return model


def peft_side(model: nn.Module, ranks: list[int], ids: list[int], dtype: torch.dtype):
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=ranks[0], target_modules=["l"]), adapter_name="a0"
    )
    for k, rank in enumerate(ranks[1:], 1):
        wrapped.add_adapter(f"a{k}", LoraConfig(r=rank, target_modules=["l"]))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    names = [f"a{k}" for k in ids]
    layer = wrapped.eval().base_model.model.l
    return lambda x: layer(x, adapter_names=names)


def fadapt_side(model: nn.Module, ranks: list[int], ids: list[int], dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    methods = [fa.LoRA(rank=r, init="gaussian", dtype=dtype) for r in ranks]
    adapters = [fa.init(method, model, generator=g) for method in methods]
    bank, unit = fa.stack(adapters, methods=methods)
    mixed = fa.bind_mixed(model, unit)
    rows = mixed.rows(ids, bank)  # once for all layers of a model, and here once for all calls
    return lambda bank, x: mixed(bank, rows, x), bank


def gathered(model: nn.Module, bank, ids: list[int], device: str) -> Callable[[Tensor], Tensor]:
    A, B = bank["l"]
    index = torch.tensor(ids, device=device)

    def run(x: Tensor) -> Tensor:
        h = torch.bmm(x, A.index_select(0, index).mT)
        return model(x) + torch.bmm(h, B.index_select(0, index).mT)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--base", default="dense", choices=["dense", "int8"])
    parser.add_argument("--width", type=int)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each side of a ratio")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    width = args.width or (4096 if on_gpu else 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
    print(machine(args.device))
    print(f"one {args.base} layer of {width} x {width}, adapters and activations in {dtype}")
    names = ["PEFT", "gather+bmm", "fadapt", "base", *(GRAPHS if on_gpu else [])]
    print(f"{'batch x tokens, K, rank':<26} " + " ".join(f"{n:>13}" for n in names), end=" ")
    print(f"{'PEFT/fadapt':>12} {'gather/fadapt':>14} {'fadapt/base':>12}", end="")
    print(f" {'PEFT/graph':>12}" if on_gpu else "")
    model = base_model(width, args.base, dtype, args.device)
    for batch, tokens, k, rank in product((32, 256), (1, 128), (32, 64), ("16", "64", "ragged")):
        ranks = [8 * (1 + i % 8) for i in range(k)] if rank == "ragged" else [int(rank)] * k
        ids = torch.randint(k, (batch,), generator=torch.Generator().manual_seed(1)).tolist()
        x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0))
        x = x.to(args.device, dtype)
        ours, bank = fadapt_side(model, ranks, ids, dtype)
        sides: dict[str, partial[object]] = {
            "PEFT": partial(peft_side(model, ranks, ids, dtype), x),
            "gather+bmm": partial(gathered(model, bank, ids, args.device), x),
            "fadapt": partial(ours, bank, x),
            "base": partial(model, x),
        }
        with torch.inference_mode():
            if on_gpu:
                # The bank is part of the graph: it is not copied into it at every call.
                sides["graph"] = partial(fa.cuda_graph(partial(ours, bank), x), x)
                sides["gather graph"] = partial(fa.cuda_graph(sides["gather+bmm"].func, x), x)
                sides["base graph"] = partial(fa.cuda_graph(model, x), x)
            t = medians(sides, args.device, args.seconds)
        label = f"{batch} x {tokens}, {k}, {rank}"
        print(
            f"{label:<26} " + " ".join(f"{t[n] * 1e6:>10.0f} us" for n in names),
            f"{t['PEFT'] / t['fadapt']:>11.2f}x {t['gather+bmm'] / t['fadapt']:>13.2f}x "
            f"{t['fadapt'] / t['base']:>11.2f}x",
            f"{t['PEFT'] / t['graph']:>11.2f}x" if on_gpu else "",
            flush=True,
        )


if __name__ == "__main__":
    main()
