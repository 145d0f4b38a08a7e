"""Run an exported graph, whatever its format, by the names of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fadapt.bank import Bank
from fadapt.errors import AdapterError, CheckpointError, listing
from fadapt.export_manifest import (
    count_of,
    leaf_names,
    of_files,
    plain_bank,
    read_manifest,
    scalings_of,
)
from fadapt.export_shapes import check_shapes
from fadapt.rows import checked_ids

Run = Callable[..., list[Tensor]]


def load_export(path: str | Path) -> Run:
    """What :func:`fadapt.export` wrote, as ``run(ids, inputs, bank=None)``.

    ``ids`` are integers ``[n]``, or names: of the ``Bank`` that is given, or of one that was baked
    in. ``inputs`` are the model's by name. ``bank`` is a ``Bank`` or a prepared stack, of the same
    layers and methods as the one that the graph was exported with, and of a stack's scaling; None
    if it was baked in. It returns the outputs, in the manifest's order. Tensors are made
    contiguous: an AOTInductor package itself does not look at strides, and would read a ``Bank``'s
    as others. A copy of the last bank is kept, until another comes, or it is written to.

    Args:
        path: of the file; its manifest lies beside it.

    Raises:
        CheckpointError: no manifest, or one of another file; a package of another torch; an ONNX
            model of operations that ONNX Runtime does not have for a CPU.
        AdapterError: from ``run``: inputs that the graph does not have, or lacks; of another dtype
            or shape, ids that are not one a row; another kind of bank; an unknown name, an id out
            of range.

    Example:
        ``run = load_export("model.onnx")``;
        ``run(["alice", "base"], {"input_ids": ids, "attention_mask": mask}, bank)[0]`` are logits.
    """
    path = Path(path)
    about = read_manifest(path)
    if any(about.get(name) != value for name, value in of_files(path).items()):
        raise CheckpointError(f"{path} is not what its manifest tells of. Export again.")
    if about["format"] == "aoti.pt2" and about["torch"] != torch.__version__:
        raise CheckpointError(
            f"{path} was compiled by torch {about['torch']}, and this is {torch.__version__}: a "
            "package runs on its own alone. Export again."
        )
    names: list[str] = about["inputs"]
    call = _LOADERS[about["format"]](path)
    banks = sum(name.startswith("bank_") for name in names)
    last = _Last()

    def run(
        ids: Tensor | Sequence[int] | Sequence[str],
        inputs: Mapping[str, Tensor],
        bank: Any = None,
    ) -> list[Tensor]:
        leaves = [] if bank is None else tree_leaves(plain_bank(bank))
        if {"ids", *inputs} != set(names[: len(names) - banks]) or len(leaves) != banks:
            raise AdapterError(
                f"{path.name} takes {names}; given are ids, {', '.join(inputs)} and a bank of "
                f"{len(leaves)} leaves."
            )
        if odd := [name for name, value in inputs.items() if not isinstance(value, Tensor)]:
            raise AdapterError(
                f"{path.name}: the input {odd[0]!r} is a {type(inputs[odd[0]]).__name__}; pass "
                "torch tensors."
            )
        if bank is not None and not last.holds(leaves):
            _check_bank(bank, about, path)
            check_shapes({f"bank_{k}": t for k, t in enumerate(leaves)}, about["shapes"], path.name)
            last.take(leaves)
        count = about["count"] if bank is None else count_of(plain_bank(bank))
        rows = checked_ids(_ids(ids, bank, about), count)[0].to(torch.int64)
        given = {"ids": rows, **inputs}
        check_shapes(given, about["shapes"], path.name)
        ordered = [given[name] for name in names[: len(names) - banks]]
        return call([t.contiguous() for t in ordered], last.leaves if leaves else [])

    return run


class _Last:
    """The leaves of the bank that came last, checked, and contiguous: a server's next call has the
    same, and a ``Bank``'s would be copied for each token."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self._taken: list[tuple[Tensor, int | None]] = []

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these are they, and nothing was written to them since."""
        both = zip(leaves, self._taken, strict=False)
        return len(leaves) == len(self._taken) and all(
            leaf is taken and version is not None and version == _version(leaf)
            for leaf, (taken, version) in both
        )

    def take(self, leaves: Sequence[Tensor]) -> None:
        self._taken = [(leaf, _version(leaf)) for leaf in leaves]
        self.leaves = [leaf.contiguous() for leaf in leaves]


def _version(tensor: Tensor) -> int | None:
    """How often it, or what it is a view of, was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _check_bank(bank: Any, about: Mapping[str, Any], path: Path) -> None:
    names, taken = leaf_names(plain_bank(bank)), about["bank"]
    if names != taken:
        odd = sorted(set(names) ^ set(taken)) or names
        raise AdapterError(
            f"{path.name} was exported for a bank of other leaves: {listing(odd)} differ. Pass one "
            "of the same layers and methods, as bind_mixed(model, method).prepare(bank) has it."
        )
    if isinstance(bank, Bank) and scalings_of(bank.method, bank.params) != about["scalings"]:
        raise AdapterError(
            f"{path.name} scales its adapters otherwise than this Bank, in which LoRA's scaling is "
            "folded into B. Export with the bank, or with what fadapt.stack(adapters, methods) "
            "returns."
        )


def _ids(ids: Any, bank: Any, about: Mapping[str, Any]) -> Any:
    if isinstance(ids, Tensor) or not any(isinstance(name, str) for name in ids):
        return ids
    known = about["ids"] if bank is None else None
    if isinstance(bank, Bank):
        return bank.ids(ids)
    if known is None or any(name not in known for name in ids):
        raise AdapterError(
            f"names {list(ids)}: the graph knows {sorted(known) if known else 'none'}; pass a "
            "Bank, or integers."
        )
    return [known[name] for name in ids]


def _program(path: Path) -> Callable[..., list[Tensor]]:
    module = torch.export.load(path).module()
    return lambda given, leaves: tree_leaves(module(given[0], given[1:], leaves))


def _aoti(path: Path) -> Callable[..., list[Tensor]]:
    package: Any = torch._inductor.aoti_load_package(str(path))
    return lambda given, leaves: tree_leaves(package(given[0], given[1:], leaves))


def _onnx(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise CheckpointError(
            f"{path}: ONNX Runtime's CPU form cannot run it: {' '.join(str(error).split())[:200]}. "
            "It has no bfloat16: export the model in float32 or float16, or to .pt2."
        ) from error
    names = [one.name for one in session.get_inputs()]

    def call(given: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.detach().cpu().numpy() for tensor in (*given, *leaves)]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]

    return call


_LOADERS = {"pt2": _program, "aoti.pt2": _aoti, "onnx": _onnx}
