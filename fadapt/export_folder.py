"""``fadapt export``: a model's folder and its adapters become one graph in a file."""

import argparse
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves

from fadapt.export import export, suffix_of
from fadapt.export_manifest import bank_of, ids_of, plain_bank
from fadapt.models import load_model, quiet
from fadapt.named_adapters import adapter_folders, load_bank
from fadapt.settings import BASES, COUNT, DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt export``."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a PEFT folder and its name; as many as there are, of any rank, targets and method",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="*.onnx, *.pt2 or *.aoti.pt2"
    )
    parser.add_argument("--base", choices=BASES, default="dense", help="format of the weights")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of all else; auto is float32"
    )
    parser.add_argument(
        "--kv-cache", action="store_true", help="with the keys and values of past tokens"
    )
    parser.add_argument(
        "--bake",
        action="store_true",
        help="write the adapters into the graph; else they are its inputs, and beside it, in "
        "FILE.bank.safetensors",
    )
    parser.add_argument(
        "--opset", type=COUNT, default=argparse.SUPPRESS, help="of ONNX (default: 21)"
    )
    parser.add_argument(
        "--external-data",
        action="store_true",
        help="of ONNX: the weights in FILE.data, as they are anyway from 2 GiB on",
    )


def run(arguments: argparse.Namespace) -> int:
    """Load, export, and say what the graph's inputs are."""
    out, opset = arguments.out, getattr(arguments, "opset", None)
    external = True if arguments.external_data else None
    suffix_of(out, opset, external)
    folders = adapter_folders(arguments.adapter)
    model: Any = load_model(arguments.model, arguments.base, arguments.dtype, length=None)
    bank = load_bank(model, folders)
    with quiet():
        export(
            model,
            bank.method,
            out,
            bank=bank,
            kv_cache=arguments.kv_cache,
            bake=arguments.bake,
            opset=opset,
            external_data=external,
        )
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; what it takes is in {out.name}.json")
    if not arguments.bake:
        print(f"{_write_bank(out, bank)}: the adapters, its inputs bank_0 and so on")
    print(", ".join(f"{name} = {k}" for name, k in ids_of(bank).items()))
    return 0


def _write_bank(out: Path, bank: Any) -> Path:
    from safetensors.torch import save_file

    path = bank_of(out)
    leaves = tree_leaves(plain_bank(bank))
    save_file({f"bank_{k}": leaf.contiguous() for k, leaf in enumerate(leaves)}, path)
    return path
