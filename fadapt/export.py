"""One graph of a mixed batch: ``torch.export`` (.pt2), ONNX and AOTInductor, the adapters' ids an
input."""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt.bank import Bank
from fadapt.batching import bind_mixed
from fadapt.errors import ConfigError
from fadapt.export_cache import decoder_inputs, output_names, with_cache
from fadapt.export_graph import Axes, check_axes, trace
from fadapt.export_manifest import (
    bank_of,
    check_export,
    count_of,
    data_of,
    ids_of,
    leaf_names,
    of_source,
    plain_bank,
    scalings_of,
    write_manifest,
)
from fadapt.export_onnx import write_onnx
from fadapt.export_shapes import shapes_of
from fadapt.kinds import Kinds
from fadapt.method import Method

__all__ = ["check_export", "export"]
_AOTI = ".aoti.pt2"
_FORMATS = (_AOTI, ".pt2", ".onnx")


def export(
    model: nn.Module,
    method: Method | Kinds,
    path: str | Path,
    *,
    bank: Any,
    inputs: Mapping[str, Tensor] | None = None,
    dynamic: Axes | None = None,
    kv_cache: bool = False,
    bake: bool = False,
    pick: Callable[[Any], Any] = lambda output: getattr(output, "logits", output),
    state: Mapping[str, Tensor] | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
) -> Path:
    """Write a graph in which row i of the batch wears adapter ``ids[i]``, -1 for none.

    Int8 weights stay int8 in the file, and where activations are rounded to int8 too, they are
    multiplied as integers. Beside it goes ``NAME.json``, a manifest of what it was made of, which
    :func:`check_export` compares, and of its inputs' names, in order.

    The suffix is the format: ``.pt2`` is a program of ``torch.export``, ``.aoti.pt2`` an
    AOTInductor package for this machine, ``.onnx`` a model for ONNX Runtime (whose CPU form has no
    bfloat16). :func:`fadapt.load_export` runs all three. By themselves the first two are called
    with ``(ids, [inputs], [leaves of the bank])``, and a package reads its inputs without a look at
    their strides: they must be contiguous.

    Args:
        model: in eval mode; only read.
        method: of the bank.
        path: ``*.pt2``, ``*.aoti.pt2`` or ``*.onnx``.
        bank: a stack of K adapters (or of several kinds of them), or a :class:`fadapt.Bank`, whose
            names and ids go to the manifest.
        inputs: the model's keyword inputs by name, an example of each. Dynamic axes must be of at
            least 2, or torch.export takes their size for a constant. None for those of a causal LM
            of transformers: ``input_ids`` and ``attention_mask``, ``[batch, sequence]``.
        dynamic: ``{input: {axis: name}}``; axes of one name are of one size. ``ids`` has the axis
            ``"batch"``. When it runs, each may be of 1.
        kv_cache: of a causal LM: for each layer N take ``past_key_values.N.key`` and ``.value``
            ``[batch, heads, past, size]``, and return ``present.N.key`` and ``.value`` after the
            logits; the mask is ``[batch, past + sequence]``, and ``position_ids`` are an input.
            One graph for the prompt (``past`` is 0) and for every token after it.
        bake: write the bank into the graph. Otherwise its leaves are inputs too, ``bank_0`` and so
            on in the order of the manifest's ``"bank"``, of any K and any rank: other adapters need
            no other export. They are the leaves that ``bind_mixed(model, method).prepare(bank)``
            has, and a ``Bank``'s: of LoRA the parameters themselves, of OFT the rotations, of DoRA
            also the norms, so that no run makes them again.
        pick: what of the model's output is the graph's; without ``kv_cache``.
        state: as :func:`fadapt.bind`'s.
        opset: of ONNX; 21 if None.
        external_data: of ONNX: put the weights beside the graph, in ``NAME.onnx.data``. If None,
            where they are too large for one file (2 GiB).

    Returns:
        ``path``.

    Raises:
        ConfigError: another suffix, a folder, an axis of 1, no axis named ``"batch"``, an input of
            the name of one of the graph's own; inputs that ``kv_cache`` makes itself; a model whose
            cache is of another kind; an operation, or an opset, that ONNX does not have.
        AdapterError: the bank does not fit.

    Follows ``torch.export``, ``torch.onnx.export(dynamo=True)``,
    ``torch._inductor.aoti_compile_and_package``, and Optimum's names of a decoder's inputs.
    """
    path = Path(path)
    kind = suffix_of(path, opset, external_data)
    params, method_ = plain_bank(bank), _method(method, bank, bake)
    if (inputs is None) != (dynamic is None) or (kv_cache and inputs is not None):
        raise ConfigError(
            "pass inputs= and dynamic= both, or neither; kv_cache=True makes them itself."
        )
    if inputs is not None and dynamic is not None:
        check_axes(inputs, dynamic)
        if odd := [name for name in inputs if name == "ids" or name.startswith("bank_")]:
            raise ConfigError(
                f"the model's input {odd[0]!r} would have the name of one of the graph's own (ids, "
                "bank_0, ...): export a module that calls it otherwise."
            )
    mixed = bind_mixed(model, method_, state)
    if inputs is None or dynamic is None:
        inputs, dynamic = decoder_inputs(mixed, kv_cache)
    params = mixed.prepare(params)
    program = trace(
        mixed,
        params,
        inputs,
        dynamic,
        with_cache if kv_cache else lambda run, given: pick(run(**given)),
        bake,
    )
    leaves = [] if bake else [f"bank_{k}" for k in range(len(tree_leaves(params)))]
    about = of_source(model, method, bank if bake else None, state) | {
        "format": kind[1:],
        "inputs": ["ids", *inputs, *leaves],
        "outputs": output_names(dict(inputs)) if kv_cache else None,
        "bank": leaf_names(params),
        "count": count_of(params),
        "scalings": scalings_of(method_, params),
        "shapes": shapes_of(inputs, dynamic, None if bake else params),
        "ids": ids_of(bank) if isinstance(bank, Bank) else None,
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        fresh = Path(folder) / path.name
        if kind == ".onnx":
            shapes = [about["shapes"][name][1:] for name in about["inputs"]]
            axes = [{k: a for k, a in enumerate(at) if isinstance(a, str)} for at in shapes]
            write_onnx(
                program, fresh, about["inputs"], about["outputs"], axes, opset, external_data
            )
        elif kind == ".pt2":
            torch.export.save(program, fresh)
        else:
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(fresh))
        # Until its manifest is written too, the old one does not fit it.
        data_of(path).unlink(missing_ok=True)
        bank_of(path).unlink(missing_ok=True)
        for made in (data_of(fresh), fresh):
            if made.exists():
                os.replace(made, path.with_name(made.name))
    write_manifest(path, about)
    return path


def suffix_of(path: Path, opset: int | None, external_data: bool | None) -> str:
    """The format of ``path``, if these options and its folder fit it.

    Raises:
        ConfigError: they do not.
    """
    kind = next((suffix for suffix in _FORMATS if path.name.endswith(suffix)), None)
    if kind is None:
        raise ConfigError(
            f"export to {path.name}: expected one of {', '.join(_FORMATS)} for a suffix."
        )
    if not path.parent.is_dir():
        raise ConfigError(f"export to {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise ConfigError(f"export to {path}: it is a folder; name a file.")
    if kind != ".onnx" and (opset is not None or external_data is not None):
        raise ConfigError(f"opset= and external_data= are ONNX's, and {path.name} is {kind}.")
    return kind


def _method(method: Any, bank: Any, bake: bool) -> Any:
    if isinstance(bank, Bank) and method != bank.method:
        raise ConfigError("a Bank is exported with its own method: pass bank.method.")
    if bake or not isinstance(method, Kinds) or method.order is None:
        return method
    if list(method.order) != sorted(method.order):
        raise ConfigError(
            "these adapters were stacked with their kinds in turns, and a graph that takes other "
            "banks must count ids kind by kind. Stack those of one kind one after the other, use a "
            "fadapt.Bank, or bake the bank in."
        )
    return replace(method, order=None)
