"""What ``fadapt merge`` is about to do to a folder: all of it read, checked and laid out first."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt.bases import base_of
from fadapt.errors import CheckpointError, ConfigError, near
from fadapt.folder_formats import (
    PLAIN,
    check_target,
    empty,
    fill,
    flat,
    metadata_of,
    quantization_config,
    quantized_by,
    skeleton,
)
from fadapt.layer_merge import with_bias
from fadapt.peft import load_peft
from fadapt.plan import Plan, plan, tied
from fadapt.shards import Piece, copied, mapped, piece_like, read_header
from fadapt.shell import join


class Folder(NamedTuple):
    """A model's folder, and what is to become of it.

    Attributes:
        todo: the layers that change: adapted, or put into another format.
        parts: ``{path: the layer's tensors in the new files}``.
        owners: ``{name in the old files: path of the layer that it goes with}``.
        metadata: of the new files.
        files: ``{old file: the pieces of the new one}``.
        config: of the new folder, or None where it stays.
        turned: the layers that get another format.
    """

    todo: Plan
    parts: dict[str, list[Piece]]
    owners: dict[str, str]
    metadata: dict[str, str]
    files: dict[Path, list[Piece]]
    config: dict[str, Any] | None
    turned: set[str]

    def target(self, path: str, to: str | None) -> str | None:
        """The format that a layer is merged into; None for its own."""
        return to if path in self.turned else None


def read_folder(
    model: Path, adapters: Sequence[Path], out: Path, to: str | None, safe: bool
) -> Folder:
    """Read everything, check everything, and lay out the new files."""
    if to is not None:
        check_target(to)
    files, config = _check(model, out)
    headers = {file: read_header(file) for file in files}
    shell = skeleton(model, config)
    together = _tied(shell)
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for file, (about, entries) in headers.items():
        metadata |= about
        tensors |= mapped(file, entries)
    fill(shell, tensors, metadata)
    loaded = [load_peft(folder, shell) for folder in adapters]
    names = {name for _, entries in headers.values() for name in entries}
    for params, _ in loaded:  # a layer that is in no file has no device to load an adapter to
        for path, leaf in params.items():
            if any(tensor.is_meta for tensor in tree_leaves(leaf)):
                raise _missing(join(path, "weight"), names, model)
    todo = plan(shell, [p for p, _ in loaded], [m for _, m in loaded], safe)
    head, wanted = _linears(shell)
    if to is not None:
        steps = {path: todo.steps.get(path, ()) for path in [*wanted, *todo.bases]}
        bases = {path: base_of(shell.get_submodule(path)) for path in steps}
        todo = Plan(bases, steps, todo.saved, todo.biases)
        if not wanted:
            raise ConfigError(
                f"--to {to}: this {type(shell).__name__} has no nn.Linear beside its output head "
                "(GPT-2's layers are Conv1D, which no other format's files hold)."
            )
    owners: dict[str, str] = {}
    parts: dict[str, list[Piece]] = {}
    turned: set[str] = set()
    described = {n: t for n, t in metadata.items() if t.startswith("{")}
    for path, base in todo.bases.items():
        same = todo.adapted(path).bias is base.bias
        new: Any = base
        if to is not None and path in wanted:
            new = empty(to, base, path)
            turned.add(path)
        new = with_bias(new, base.bias)
        old_tensors, old_told = flat(path, base)
        new_tensors, new_told = flat(path, new)
        described = {n: t for n, t in described.items() if n not in old_told} | new_told
        stays = {join(path, "bias")} if same else set()
        owners |= dict.fromkeys(old_tensors.keys() - stays, path)
        parts[path] = [piece_like(n, t) for n, t in new_tensors.items() if n not in stays]
    for name in (*owners, *todo.beside):
        if name not in names:
            raise _missing(name, names, model)
        others = together.get(name, set()) - names
        if others:  # where a file holds them too, transformers reads them apart
            path, *rest = (n.rpartition(".")[0] for n in (name, *sorted(others)))
            raise tied(path, rest)
    laid = _lay_out(headers, owners, parts, todo.beside)
    every = [piece.name for pieces in laid.values() for piece in pieces]
    wide = {n: t for n, t in described.items() if t != PLAIN}
    about = metadata_of(every, wide) if wide or to is not None else metadata
    if to is None:
        return Folder(todo, parts, owners, about, laid, None, turned)
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    told = quantization_config(to, head)
    config |= {} if told is None else {"quantization_config": told}
    return Folder(todo, parts, owners, about, laid, config, turned)


def _lay_out(
    headers: Mapping[Path, Any],
    owners: Mapping[str, str],
    parts: Mapping[str, list[Piece]],
    saved: Mapping[str, Tensor],
) -> dict[Path, list[Piece]]:
    """The new files: a layer's new tensors where the first of its old ones was."""
    files: dict[Path, list[Piece]] = {}
    seen: set[str] = set()
    for file, (_, entries) in headers.items():
        pieces: list[Piece] = []
        for name, at in entries.items():
            path = owners.get(name)
            if path is not None:
                pieces += [] if path in seen else parts[path]
                seen.add(path)
            else:
                piece = copied(name, file, at)
                pieces.append(piece._replace(source=None) if name in saved else piece)
        files[file] = pieces
    return files


def _tied(shell: nn.Module) -> dict[str, set[str]]:
    """``{name: the other names of the same parameter}``, before the files' weights are in."""
    names: dict[int, set[str]] = {}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: found - {name} for found in names.values() for name in found if len(found) > 1}


def _linears(shell: Any) -> tuple[list[str], list[str]]:
    """The paths of the output head, and of all other linear layers."""
    head = shell.get_output_embeddings() if hasattr(shell, "get_output_embeddings") else None
    paths: tuple[list[str], list[str]] = ([], [])
    for path, module in shell.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "QuantizedLinear":
            paths[0 if module is head else 1].append(path)
    return paths


def _check(model: Path, out: Path) -> tuple[list[Path], dict[str, Any]]:
    if not (model / "config.json").is_file():
        raise CheckpointError(f"--model {model}: no config.json there; expected a model's folder.")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"--model {model}: no .safetensors file in it.")
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        odd = not isinstance(config, dict) or not isinstance(
            config.get("quantization_config") or {}, dict
        )
    except ValueError:
        odd = True
    if odd:
        raise CheckpointError(f"--model {model}: its config.json is not that of a model.")
    quantized_by(model, config)
    if out.exists():
        raise CheckpointError(f"--out {out} exists already: remove it, or name another folder.")
    return files, config


def _missing(name: str, names: set[str], model: Path) -> CheckpointError:
    return CheckpointError(
        f"the adapter changes {name!r}, which is in no file of {model}: it may be tied to another "
        f"tensor, or named otherwise there.{near(name, names)} Load the model and call "
        "fadapt.merged_model."
    )
