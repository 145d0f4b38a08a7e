"""``fadapt merge``: adapters into a model's folder, a layer at a time, into a new folder.

The model's files are mapped, not read; each tensor of the result goes to disk as it is made. So a
model larger than memory can be merged. What was finished before a run was stopped is kept.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fadapt.errors import AdapterError, CheckpointError, MergeError
from fadapt.folder_formats import TARGETS, flat
from fadapt.folder_plan import Folder, read_folder
from fadapt.merging import check_rounding, merge_layers
from fadapt.progress import progress_bar
from fadapt.settings import SEED
from fadapt.shards import write

Progress = Callable[[str, int, int], Any]
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt merge``."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument(
        "--adapter", type=Path, required=True, nargs="+", help="PEFT folders, merged in this order"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help=f"the format of every linear layer but the output head: {TARGETS} (default: as it is)",
    )
    parser.add_argument(
        "--rounding",
        choices=["nearest", "search", "stochastic"],
        default="nearest",
        help="of the weights",
    )
    parser.add_argument(
        "--seed", type=SEED, default=0, help="of --rounding stochastic and --to aqlm"
    )
    parser.add_argument(
        "--unsafe", action="store_true", help="merge even if the result holds NaN or Inf"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, with a progress bar."""
    with progress_bar() as bar:
        count = merge_folder(
            arguments.model,
            arguments.adapter,
            arguments.out,
            to=arguments.to,
            rounding=arguments.rounding,
            seed=arguments.seed,
            safe=not arguments.unsafe,
            progress=bar,
        )
    print(f"merged {count} layers into {arguments.out}")
    return 0


def merge_folder(
    model: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    to: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    safe: bool = True,
    progress: Progress | None = None,
) -> int:
    """Merge adapters into the weights of a model's folder.

    ``out`` appears when it is whole. Until then the work lies beside it, in ``.NAME.partial``, and
    the same call again goes on from the last finished file.

    Args:
        model: a folder of a transformers model with safetensors files, its linear layers dense, or
            torchao's or AQLM's.
        adapters: PEFT folders, merged in this order.
        out: the folder to write, which ``from_pretrained`` loads.
        to: the format of every linear layer but the output head, adapted or not: one of
            :data:`fadapt.folder_formats.TARGETS`; None leaves each as it is.
        rounding, seed: as :func:`fadapt.merge`; each layer draws from a generator of its own.
        safe: refuse NaN and Inf.
        progress: told before each layer: its path, its index, their number.

    Returns:
        How many layers were written anew, those of a run before counted.

    Raises:
        CheckpointError: a folder that cannot be read, or is there already; a disk without room.
        ConfigError: no folder holds the format ``to``, or it has no use for the rounding.
        AdapterError, MergeError: as :func:`fadapt.merge`.
    """
    check_rounding(to, rounding)
    folder = read_folder(model, adapters, out, to, safe)
    identity = {"to": to, "rounding": rounding, "seed": seed, "safe": safe}
    work = _work_folder(out, _identity(model, adapters) | identity)
    left = {f: pieces for f, pieces in folder.files.items() if not (work / f.name).exists()}
    _check_room(work, sum(piece.size for pieces in left.values() for piece in pieces))
    todo, order = folder.todo, {path: k for k, path in enumerate(folder.todo.bases)}
    of_path = {piece.name: path for path, pieces in folder.parts.items() for piece in pieces}
    done: dict[str, Tensor] = {}

    def make(name: str) -> Tensor:
        if name in todo.beside:
            return todo.beside[name]
        path = of_path[name]
        if name not in done:
            done.clear()
            if progress is not None:
                progress(path, order[path], len(order))
            options: Any = {"rounding": rounding, "safe": safe, "to": folder.target(path, to)}
            options["generator"] = torch.Generator().manual_seed(
                (seed * 1_000_003 + order[path]) % 2**63
            )
            ((_, _, merged),) = merge_layers(todo.only(path), **options)
            done.update(flat(path, merged.base)[0])
        return done.pop(name)

    for file, pieces in left.items():
        try:
            write(work / file.name, pieces, folder.metadata, make)
        except (AdapterError, MergeError):
            shutil.rmtree(work, ignore_errors=True)  # the same call would end here again
            raise
        except OSError as error:
            raise CheckpointError(
                f"could not write {work / file.name}: {error.strerror or error}. What is finished "
                "is kept: the same command goes on from there."
            ) from error
        done.clear()
    _finish(model, work, out, folder)
    return len(order)


def _identity(model: Path, adapters: Sequence[Path]) -> dict[str, Any]:
    from fadapt import __version__

    digests = []
    for folder in adapters:
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                digest.update(path.name.encode() + content)
        digests.append(digest.hexdigest())
    files = sorted(p for p in model.iterdir() if p.is_file())
    stats = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in files]  # bytes are too many
    about = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return {"fadapt": __version__, "model": about, "adapters": digests}


def _work_folder(out: Path, identity: dict[str, Any]) -> Path:
    """The unfinished folder: an earlier run's if it was of the same merge, else a new one."""
    work = out.with_name(f".{out.name}.partial")
    about = work / "merge.json"
    try:
        if about.is_file() and json.loads(about.read_text("utf-8")) == identity:
            return work
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        about.write_text(json.dumps(identity), "utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not prepare {work}: {error}.") from error
    return work


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise CheckpointError(
            f"the merged model needs {needed:,} more bytes, and {work.parent} has {free:,} left. "
            "Nothing was merged. Make room, or name a folder on another disk with --out."
        )


def _finish(model: Path, work: Path, out: Path, folder: Folder) -> None:
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in _LEFT_OUT:
            shutil.copyfile(path, work / path.name)
    if folder.config is not None:
        (work / "config.json").write_text(json.dumps(folder.config, indent=2) + "\n", "utf-8")
        for index in work.glob("*.safetensors.index.json"):
            about = json.loads(index.read_text("utf-8"))
            about["weight_map"] = {p.name: f.name for f, ps in folder.files.items() for p in ps}
            total = sum(p.size for ps in folder.files.values() for p in ps)
            about["metadata"] = dict(about.get("metadata") or {}, total_size=total)
            index.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    (work / "merge.json").unlink()
    os.replace(work, out)
