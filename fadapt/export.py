"""One graph of a mixed batch: ``torch.export`` (.pt2) and ONNX, the adapters' ids an input."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from fadapt.batching import bind_mixed
from fadapt.errors import CheckpointError, ConfigError
from fadapt.method import Method

Axes = Mapping[str, Mapping[int, str]]
_FORMATS = (".pt2", ".onnx")
_LARGEST = 2**20  # of any dynamic axis


class _Graph(nn.Module):
    """The call that is exported: ids, then the model's inputs, then the bank's leaves."""

    def __init__(self, mixed: Any, names: Sequence[str], bank: Any, spec: Any, pick: Any):
        super().__init__()
        self.shell = mixed.shell  # so that the weights are the program's own
        self.mixed, self.names, self.spec, self.pick = [mixed], names, spec, pick
        self.held = [bank]

    def forward(self, ids: Tensor, inputs: list[Tensor], leaves: list[Tensor]) -> Any:
        bank = tree_unflatten(leaves, self.spec) if leaves else self.held[0]
        return self.pick(self.mixed[0](bank, ids, **dict(zip(self.names, inputs, strict=True))))


def export(
    model: nn.Module,
    method: Method,
    path: str | Path,
    *,
    bank: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    dynamic: Axes,
    bake: bool = False,
    pick: Callable[[Any], Any] = lambda output: getattr(output, "logits", output),
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a graph in which row i of the batch wears adapter ``ids[i]``, -1 for none.

    Int8 weights stay int8 in the file. Beside it goes ``NAME.json``, a manifest of what it was made
    of, which :func:`check_export` compares.

    Args:
        model: in eval mode; only read.
        method: of the bank.
        path: ``*.pt2`` or ``*.onnx``.
        bank: a stack of K adapters.
        inputs: the model's keyword inputs by name, an example of each. Dynamic axes must be of at
            least 2, or torch.export takes their size for a constant.
        dynamic: ``{input: {axis: name}}``; axes of one name are of one size. ``ids`` has the axis
            ``"batch"``.
        bake: write the bank into the graph. Otherwise its leaves are inputs too, ``bank_0`` and so
            on in the order of the manifest's ``"bank"``, of any K and any rank: other adapters need
            no other export.
        pick: what of the model's output is the graph's.
        state: as :func:`fadapt.bind`'s.

    Returns:
        ``path``.

    Raises:
        ConfigError: another suffix, an axis of 1, no axis named ``"batch"``.

    Follows ``torch.export`` and ``torch.onnx.export(dynamo=True)``.
    """
    path = Path(path)
    sizes = {name: inputs[key].shape[k] for key, at in dynamic.items() for k, name in at.items()}
    if path.suffix not in _FORMATS:
        raise ConfigError(f"export to {path.name}: expected one of {', '.join(_FORMATS)}.")
    if "batch" not in sizes or min(sizes.values()) < 2:
        raise ConfigError(
            f"the dynamic axes of the example have the sizes {sizes}: each must be at least 2, and "
            "one is named 'batch', which is the ids' too."
        )
    mixed = bind_mixed(model, method, state)
    leaves, spec = tree_flatten(dict(bank))
    device = leaves[0].device
    ids = torch.arange(sizes["batch"], device=device) % len(leaves[0])
    axes = {name: torch.export.Dim(name, min=2, max=_LARGEST) for name in sizes}
    where = [{k: axes[n] for k, n in dynamic.get(key, {}).items()} for key in inputs]
    given = [] if bake else list(leaves)
    # Which axis of a leaf is the rank is for torch.export to find: it is what two leaves share.
    free = [dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) for t in given]
    graph = _Graph(mixed, list(inputs), bank, spec, pick).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's, of the shell that functional_call lends
        program = torch.export.export(
            graph,
            (ids, list(inputs.values()), given),
            dynamic_shapes=({0: axes["batch"]}, where, free),
            strict=False,
        )
        beside = path.with_name(f".{path.name}.partial{path.suffix}")
        if path.suffix == ".pt2":
            torch.export.save(program, beside)
        else:
            names = ["ids", *inputs, *(f"bank_{k}" for k in range(len(given)))]
            torch.onnx.export(
                program, f=str(beside), input_names=names, external_data=False, optimize=False
            )
    about = _manifest(model, method, bank if bake else None, state)
    about["bank"] = [
        torch.utils._pytree.keystr(k) for k, _ in tree_flatten_with_path(dict(bank))[0]
    ]
    about["graph"] = hashlib.sha256(beside.read_bytes()).hexdigest()
    os.replace(beside, path)  # until its manifest is written too, the old one does not fit it
    _about(path).write_text(json.dumps(about, indent=1), "utf-8")
    return path


def check_export(
    path: str | Path,
    model: nn.Module,
    method: Method,
    bank: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise CheckpointError unless the graph at ``path`` was made of just this.

    Args:
        path: what :func:`export` wrote.
        model, method, state: as they are now.
        bank: the adapters, if they were baked in; else None.
    """
    path = Path(path)
    try:
        about = json.loads(_about(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no manifest beside it: {error}. Export again."
        ) from error
    now = _manifest(model, method, bank, state)
    now["graph"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    stale = [name for name, value in now.items() if about.get(name) != value]
    if stale:
        raise CheckpointError(f"{path} is stale: {', '.join(stale)} changed since. Export again.")


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _manifest(
    model: nn.Module, method: Method, bank: Any, state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    weights = dict(model.state_dict()) | dict(state or {})
    return {
        "weights": _digest(weights),
        "adapters": None if bank is None else _digest(dict(bank)),
        "method": repr(method),
        "torch": torch.__version__,
    }


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for key, leaf in tree_flatten_with_path(tensors)[0]:
        for name, plain in _plain(leaf):
            digest.update(f"{key}{name}{plain.dtype}{list(plain.shape)}".encode())
            flat = plain.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(leaf: Any) -> list[tuple[str, Tensor]]:
    if not isinstance(leaf, Tensor):
        return []
    if hasattr(leaf, "__tensor_flatten__"):
        inner, about = leaf.__tensor_flatten__()  # how it rounds its activations is in the latter
        return [(f"{name} {about}", getattr(leaf, name)) for name in inner]
    return [("", leaf)]
