"""What an exported graph was made of, beside it in ``NAME.json``: so that a stale one is told."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from fadapt.bank import BASE_NAME, Bank
from fadapt.bases import Dense, base_of, is_supported
from fadapt.errors import CheckpointError, UnsupportedLayerError
from fadapt.kinds import Kinds
from fadapt.shell import join, share

# Of the manifest, what :func:`fadapt.load_export` needs.
_READ = {"format", "inputs", "bank", "ids", "count", "scalings", "shapes", "torch"}


def check_export(
    path: str | Path,
    model: nn.Module,
    method: Any,
    bank: Any = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise CheckpointError unless the graph at ``path`` was made of just this.

    Args:
        path: what :func:`export` wrote.
        model, method, state: as they are now.
        bank: the adapters, if they were baked in; else None.
    """
    path = Path(path)
    about = read_manifest(path)
    now = of_source(model, method, bank, state) | of_files(path)
    if isinstance(bank, Bank):
        now["ids"] = ids_of(bank)
    stale = [name for name, value in now.items() if about.get(name) != value]
    if stale:
        raise CheckpointError(f"{path} is stale: {', '.join(stale)} changed since. Export again.")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the graph at ``path``.

    Raises:
        CheckpointError: there is none, or one of another version of fadapt.
    """
    try:
        about = json.loads(_beside(path, ".json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no manifest beside it: {error}. Export again."
        ) from error
    if not isinstance(about, dict) or not about.keys() >= _READ:
        raise CheckpointError(
            f"{path}: its manifest was not written by this version of fadapt. Export again."
        )
    return about


def write_manifest(path: Path, about: Mapping[str, Any]) -> None:
    """Write it, the files at ``path`` being there already."""
    text = json.dumps({**about, **of_files(path)}, indent=1)
    _beside(path, ".json").write_text(text, "utf-8")


def data_of(path: Path) -> Path:
    """Where an ONNX file's external data is."""
    return _beside(path, ".data")


def bank_of(path: Path) -> Path:
    """Where ``fadapt export`` puts the adapters that are a graph's inputs."""
    return _beside(path, ".bank.safetensors")


def of_source(
    model: nn.Module, method: Any, bank: Any, state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Of the model, the method and a baked bank."""
    from fadapt import __version__

    return {
        "model": _digest_model(model),
        "weights": _digest_weights(model, state),
        "adapters": None if bank is None else digest(plain_bank(bank)),
        "method": repr(method),
        "torch": torch.__version__,
        "fadapt": __version__,
    }


def of_files(path: Path) -> dict[str, Any]:
    """Of the graph's own file, and of its external data."""
    data = data_of(path)
    return {
        "graph": _digest_file(path) if path.is_file() else None,
        "data": _digest_file(data) if data.is_file() else None,
    }


def ids_of(bank: Bank) -> dict[str, int]:
    """``{name: id}`` of all adapters that are on the device, and the base."""
    names = [BASE_NAME, *sorted(bank.resident)]
    return dict(zip(names, bank.ids(names), strict=True))


def plain_bank(bank: Any) -> Any:
    """The stacks of a bank, as the built-in containers that are pytrees."""
    params = bank.params if isinstance(bank, Bank) else bank
    return tuple(map(dict, params)) if isinstance(params, tuple) else dict(params)


def count_of(params: Any) -> int:
    """How many adapters a bank's stacks have room for: K, of all kinds."""
    stacks = params if isinstance(params, tuple) else (params,)
    return sum(int(tree_leaves(one)[0].shape[0]) for one in stacks)


def scalings_of(method: Any, params: Any) -> list[dict[str, float | None]]:
    """Of each kind ``{path: scaling}``: what a graph holds of the method, whatever its bank."""
    methods = method.methods if isinstance(method, Kinds) else (method,)
    stacks = params if isinstance(params, tuple) else (params,)
    return [
        {path: getattr(at, "scaling", None) for path, at in one.at(list(stack)).items()}
        for one, stack in zip(methods, stacks, strict=True)
    ]


def leaf_names(tree: Any) -> list[str]:
    """Of every leaf, in the order of the pytree."""
    return [keystr(key) for key, _ in tree_flatten_with_path(tree)[0]]


def digest(tensors: Any) -> str:
    """Of all tensors of a pytree, and of what else is in it."""
    found = hashlib.sha256()
    for key, leaf in tree_flatten_with_path(tensors)[0]:
        if not isinstance(leaf, Tensor):
            found.update(f"{key}{leaf}".encode())
        for name, plain in _plain(leaf):
            found.update(f"{key}{name}{plain.dtype}{list(plain.shape)}".encode())
            flat = plain.detach().cpu().contiguous().reshape(-1)
            data: Any = flat.view(torch.uint8).numpy()
            found.update(data)
    return found.hexdigest()


def _digest_weights(model: nn.Module, state: Mapping[str, Tensor] | None) -> str:
    shell = share(model, state or {})
    tensors: dict[str, Any] = dict(shell.state_dict()) | dict(shell.named_buffers())
    # A quantized layer by its base: some keep their scales where a state dict has none.
    for path, module in shell.named_modules():
        base = _base(module)
        if base is not None and not isinstance(base, Dense):
            tensors = {n: t for n, t in tensors.items() if not n.startswith(join(path, ""))}
            tensors[path] = base
    found = hashlib.sha256(digest(tensors).encode())
    found.update(str(torch.utils._pytree.tree_structure(tensors)).encode())
    return found.hexdigest()


def _base(module: nn.Module) -> Any:
    try:
        return base_of(module) if is_supported(module) else None
    except UnsupportedLayerError:
        return None


def _digest_model(model: nn.Module) -> str:
    # Not everything that a graph depends on is a weight.
    kinds = [(p, type(m).__qualname__, _settings(m)) for p, m in model.named_modules()]
    config: Any = getattr(model, "config", None)
    about = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    about.pop("_name_or_path", None)  # where it lies is nothing of it
    text = json.dumps([kinds, about], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(module: nn.Module) -> str:
    """What is no tensor of one of torch's own modules: a norm's eps, a convolution's stride."""
    kind = type(module)
    return kind.extra_repr(module) if kind.__module__.startswith("torch.nn.") else ""


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(leaf: Any) -> list[tuple[str, Tensor]]:
    if not isinstance(leaf, Tensor):
        return []
    if hasattr(leaf, "__tensor_flatten__"):
        inner, about = leaf.__tensor_flatten__()  # how it rounds its activations is in the latter
        parts = [(name, _plain(getattr(leaf, name))) for name in inner]  # which may be such too
        return [(f"{name} {about} {deeper}", t) for name, found in parts for deeper, t in found]
    return [("", leaf)]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
