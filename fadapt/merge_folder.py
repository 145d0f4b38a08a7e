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
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt.errors import CheckpointError, near
from fadapt.formats import put
from fadapt.functional import join
from fadapt.merging import merge_layers
from fadapt.models import fingerprint, quiet
from fadapt.peft import load_peft
from fadapt.plan import Plan, plan
from fadapt.shards import mapped, read_header, rewrite

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
        "--rounding", choices=["nearest", "stochastic"], default="nearest", help="of the weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --rounding stochastic")
    parser.add_argument(
        "--unsafe", action="store_true", help="merge even if the result holds NaN or Inf"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def tell(path: str, k: int, total: int) -> None:
            bar.update(task, completed=k, total=total, description=path)

        count = merge_folder(
            arguments.model,
            arguments.adapter,
            arguments.out,
            rounding=arguments.rounding,
            seed=arguments.seed,
            safe=not arguments.unsafe,
            progress=tell,
        )
    print(f"merged {count} layers into {arguments.out}")
    return 0


def merge_folder(
    model: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    safe: bool = True,
    progress: Progress | None = None,
) -> int:
    """Merge adapters into the weights of a model's folder.

    ``out`` appears when it is whole. Until then the work lies beside it, in ``.NAME.partial``, and
    the same call again goes on from the last finished file.

    Args:
        model: a folder of a transformers model with safetensors files, not quantized.
        adapters: PEFT folders, merged in this order.
        out: the folder to write.
        rounding, seed: as :func:`fadapt.merge`; each layer draws from a generator of its own.
        safe: refuse NaN and Inf.
        progress: told before each layer: its path, its index, their number.

    Returns:
        How many layers were merged, those of a run before counted.

    Raises:
        CheckpointError: a folder that cannot be read, or is there already; a disk without room.
        AdapterError, MergeError: as :func:`fadapt.merge`.
    """
    files = _check(model, out)
    headers = {file: read_header(file)[1] for file in files}
    shell = _skeleton(model)
    for file, entries in headers.items():
        for name, tensor in mapped(file, entries).items():
            if _has(shell, name):
                put(shell, name, tensor)
    loaded = [load_peft(folder, shell) for folder in adapters]
    names = {name for entries in headers.values() for name in entries}
    for params, _ in loaded:  # a layer that is in no file has no device to load an adapter to
        for path, leaf in params.items():
            if any(tensor.is_meta for tensor in tree_leaves(leaf)):
                raise _missing(join(path, "weight"), names, model)
    todo = plan(shell, [p for p, _ in loaded], [m for _, m in loaded], safe)
    owners = _owners(todo, names, model)
    work = _work_folder(out, _identity(model, adapters, rounding, seed, safe))
    left = [file for file in files if not (work / file.name).exists()]
    _check_room(work, left)
    order = {path: k for k, path in enumerate(todo.bases)}
    for file in left:
        done: dict[str, Tensor] = {}

        def changed(name: str, done: dict[str, Tensor] = done) -> Tensor | None:
            if name in todo.saved:
                return todo.saved[name]
            path = owners.get(name)
            if path is None:
                return None
            if name not in done:
                if progress is not None:
                    progress(path, order[path], len(order))
                g = torch.Generator().manual_seed(seed * 1_000_003 + order[path])
                options: Any = {"rounding": rounding, "generator": g, "safe": safe}
                ((_, _, merged),) = merge_layers(todo.only(path), **options)
                done |= {join(path, n): t for n, t in merged.base.state().items()}
            return done.pop(name)

        try:
            rewrite(file, work / file.name, changed)
        except OSError as error:
            raise CheckpointError(
                f"could not write {work / file.name}: {error.strerror or error}. What is finished "
                "is kept: the same command goes on from there."
            ) from error
    _finish(model, work, out)
    return len(order)


def _check(model: Path, out: Path) -> list[Path]:
    if not (model / "config.json").is_file():
        raise CheckpointError(f"--model {model}: no config.json there; expected a model's folder.")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"--model {model}: no .safetensors file in it.")
    config = json.loads((model / "config.json").read_text("utf-8"))
    kind = config.get("quantization_config", {}).get("quant_method")
    if kind is not None:
        raise CheckpointError(
            f"--model {model} is quantized ({kind}): its files are not weights that can be merged "
            "into one by one. Load it and call fadapt.merged_model, or merge into the model that "
            "it was quantized from."
        )
    if out.exists():
        raise CheckpointError(f"--out {out} exists already: remove it, or name another folder.")
    return files


def _skeleton(folder: Path) -> nn.Module:
    """The model without its weights."""
    with quiet():
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (config.architectures or [""])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise CheckpointError(
                f"--model {folder}: config.json names the architecture {name!r}, which this "
                f"transformers {transformers.__version__} does not have."
            )
        with torch.device("meta"):
            model: nn.Module = kind(config)
    return model.eval().requires_grad_(False)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _owners(todo: Plan, names: set[str], model: Path) -> dict[str, str]:
    """``{name of a tensor that changes: its layer}``, all of them in the files."""
    owners: dict[str, str] = {}
    for path in todo.bases:
        adapted = todo.adapted(path)
        changed = ["weight"] + ([] if adapted.bias is adapted.base.bias else ["bias"])
        owners |= {join(path, n): path for n in changed}
    for name in (*owners, *todo.saved):
        if name not in names:
            raise _missing(name, names, model)
    return owners


def _missing(name: str, names: set[str], model: Path) -> CheckpointError:
    return CheckpointError(
        f"the adapter changes {name!r}, which is in no file of {model}: it may be tied to another "
        f"tensor, or named otherwise there.{near(name, names)} Load the model and call "
        "fadapt.merged_model."
    )


def _identity(
    model: Path, adapters: Sequence[Path], rounding: str, seed: int, safe: bool
) -> dict[str, Any]:
    digests = []
    for folder in adapters:
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        digests.append(digest.hexdigest())
    return {
        "model": fingerprint(model),
        "adapters": digests,
        "rounding": rounding,
        "seed": seed,
        "safe": safe,
    }


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


def _check_room(work: Path, left: Sequence[Path]) -> None:
    needed, free = sum(file.stat().st_size for file in left), shutil.disk_usage(work).free
    if needed > free:
        raise CheckpointError(
            f"the merged model needs {needed:,} more bytes, and {work.parent} has {free:,} left. "
            "Nothing was merged. Make room, or name a folder on another disk with --out."
        )


def _finish(model: Path, work: Path, out: Path) -> None:
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in _LEFT_OUT:
            shutil.copyfile(path, work / path.name)
    (work / "merge.json").unlink()
    os.replace(work, out)
