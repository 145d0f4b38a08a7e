"""PEFT's checkpoint folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

This file is about keys; ``peft_files.py`` about files, ``peft_config.py`` about options,
``peft_targets.py`` about which layers they mean, ``peft_lora.py`` about what is LoRA's own.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.errors import AdapterError, CheckpointError, ConfigError, FadaptError, listing, near
from fadapt.functional import bind
from fadapt.method import Method, over
from fadapt.peft_config import Format, format_named, format_of, read_config, write_config
from fadapt.peft_files import WEIGHTS, read_json, read_tensors, write
from fadapt.peft_targets import check_aliases, saved_by_peft
from fadapt.shell import join, layers_of, read
from fadapt.trained import beside, saved_modules, trained_biases

_PREFIX = "base_model.model."


def load_peft(folder: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Any], Any]:
    """Read an adapter that PEFT, or :func:`save_peft`, saved.

    Args:
        folder: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: what the adapter is for; only read.

    Returns:
        ``(params, method)``: ``bind(model, method)(params, x)`` is what PEFT computes. Dtypes are
        the file's, devices those of the layers; PEFT computes with a float16 or bfloat16 adapter in
        float32, as ``tree_map(Tensor.float, params)`` does here. PiSSA and OLoRA adapters, which
        PEFT keeps relative to a residual of the weights, come back as plain LoRA of twice the rank.

    Raises:
        CheckpointError: a file is missing, broken or pickled; a key that nothing claims, or a
            missing one; a shape that does not fit; an option that fadapt does not support.

    Example:
        >>> import tempfile, torch, fadapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> method = fadapt.LoRA(rank=2, targets=["0"])
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fadapt.save_peft(folder, params, method)
        ...     again, same = fadapt.load_peft(folder, model)
        >>> torch.equal(again["0"].lora_A, params["0"].lora_A)
        True
    """
    folder = Path(folder)
    config = read_json(folder)
    fmt = format_named(config)
    layers, rest = _sort_keys(read_tensors(folder), fmt, model)
    adapted = [p for p, _ in model.named_modules() if p in layers]
    check_aliases(adapted, model)
    dtypes = {tensor.dtype for layer in layers.values() for tensor in layer.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    method = read_config(config, fmt, model, adapted, None if dtype == torch.float32 else dtype)
    at = method.at(adapted)
    params: dict[str, Any] = {}
    bases: dict[str, Any] = {}
    for path, layer in layers_of(model, method).items():
        base = bases[path] = read(path, layer)
        leaf = _unpack(path, layers[path], fmt, at[path])
        try:
            over(base, at[path], path).check(base, leaf, path)
        except (AdapterError, ConfigError) as error:
            raise CheckpointError(f"{WEIGHTS}: {error}") from error
        fmt.fits(base, path)
        params[path] = type(leaf)(*(tensor.to(base.device) for tensor in leaf))
    params |= _take_saved(rest, model, method)
    for entry, path in trained_biases(model, method, bases).items():
        owner: Any = bases[path] if path in bases else model.get_submodule(path)
        params[entry] = {"bias": _taken(rest, join(entry, "bias"), owner.bias, "bias")}
    for name in [n for n in rest if n.endswith(".modules_to_save.bias")]:  # by bias="all"
        path = name.removesuffix(".modules_to_save.bias")
        if path in params and torch.equal(params[path]["bias"].cpu(), rest[name]):
            del rest[name]
    if rest:
        _check_rest(rest, model, [join(p, "*") for p in layers])
    return fmt.convert(params, method, model)


def save_peft(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    method: Method,
    model: nn.Module | None = None,
) -> None:
    """Write an adapter as PEFT does: ``PeftModel.from_pretrained(model, folder)`` loads it.

    Whenever the process ends, the folder holds the adapter that it held before, or this one, or
    (between the two, for an instant) none: never a mixture, and never half a file.

    Args:
        folder: made if it does not exist; the two files are replaced if they do.
        params: one adapter (not a stack). Dtypes are kept.
        method: its hyperparameters. With ``init="pissa"`` or ``"olora"`` the adapter is saved as
            PEFT saves these: relative to the residual, which PEFT computes again when it loads.
        model: what the adapter is for, only read. With it the adapter is checked against the
            model, and the file names the base model. Needed if ``modules_to_save`` have buffers.

    Raises:
        CheckpointError: ``params`` and ``method`` do not belong together, or PEFT has no way to
            hold them.
    """
    folder = Path(folder)
    fmt = format_of(method)
    paths = [p for p, leaf in params.items() if hasattr(leaf, "_fields")]
    _check_adapter(params, paths, fmt, method, model)
    saved, _ = beside(params, method)
    tensors: dict[str, Tensor] = {}
    for path in params:
        if path in paths:
            tensors |= {f"{path}{suffix}": t for suffix, t in fmt.pack(params[path]).items()}
        elif path not in saved:
            tensors[f"{path}.bias"] = params[path]["bias"]
        else:
            state = {} if model is None else model.get_submodule(path).state_dict()
            tensors |= {f"{path}.{name}": t for name, t in (state | dict(params[path])).items()}
    config = write_config(fmt, method, paths, saved, model)
    write(folder, {_PREFIX + key: tensor for key, tensor in tensors.items()}, config)


def _sort_keys(
    tensors: Mapping[str, Tensor], fmt: Format, model: nn.Module
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{layer: {suffix: tensor}}``; and the other keys, less the prefix."""
    modules = {p for p, _ in model.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{WEIGHTS}: the key {key!r} does not begin with {_PREFIX!r}.")
        name = key.removeprefix(_PREFIX)
        suffix = next((s for s in fmt.suffixes if name.endswith(s)), None)
        if suffix is None:
            rest[name] = tensor
            continue
        path = name.removesuffix(suffix)
        if path not in modules:
            raise CheckpointError(
                f"{WEIGHTS}: the key {key!r} is for a layer that the model does not have."
                f"{near(path, modules)}"
            )
        layers.setdefault(path, {})[suffix] = tensor
    if not layers:
        raise CheckpointError(
            f"{WEIGHTS} holds no parameters of {fmt.peft_type} (keys that end in "
            f"{listing(fmt.suffixes)}) among its {len(tensors)} keys: {listing(list(tensors))}."
        )
    return layers, rest


def _unpack(path: str, tensors: Mapping[str, Tensor], fmt: Format, method: Any) -> Any:
    """One layer's parameters, every tensor used."""
    try:
        leaf = fmt.unpack(tensors, method)
    except KeyError as error:
        key = _PREFIX + path + str(error.args[0])
        raise CheckpointError(f"layer {path!r}: the key {key!r} is missing.") from None
    except AdapterError as error:
        raise CheckpointError(f"layer {path!r}: {error}") from error
    if unread := tensors.keys() - fmt.pack(leaf).keys():
        raise CheckpointError(
            f"layer {path!r}: {_PREFIX + path + min(unread)!r} is not part of an adapter with "
            "these options."
        )
    return leaf


def _take_saved(rest: dict[str, Tensor], model: nn.Module, method: Method) -> dict[str, Any]:
    """The parameters of ``modules_to_save``, taken out of ``rest``."""
    taken: dict[str, Any] = {}
    for path, names in saved_modules(model, method).items():
        held = dict(model.get_submodule(path).named_parameters())
        taken[path] = {}
        for name in names:
            taken[path][name] = _taken(rest, join(path, name), held[name], "modules_to_save")
    return taken


def _taken(rest: dict[str, Tensor], key: str, own: Tensor, what: str) -> Tensor:
    """One tensor, taken out of ``rest``, for the model's ``own``."""
    if key not in rest:
        raise CheckpointError(f"{what}: {WEIGHTS} lacks the key {_PREFIX + key!r}.")
    tensor = rest.pop(key)
    if tensor.shape != own.shape:
        raise CheckpointError(
            f"{what}: {key!r} is {list(tensor.shape)} in {WEIGHTS} and {list(own.shape)} in the "
            "model."
        )
    return tensor.to(own.device)


def _check_rest(rest: Mapping[str, Tensor], model: nn.Module, claimed: Sequence[str]) -> None:
    """What is left must be the model's own tensors, unchanged: PEFT writes the buffers of
    ``modules_to_save`` and, if in doubt, the embeddings."""
    state = model.state_dict()
    for name, tensor in rest.items():
        key = _PREFIX + name
        own = state.get(re.sub(r"\.(base_layer|original_module)\.", ".", name))
        if own is None:
            raise CheckpointError(
                f"{WEIGHTS}: nothing claims the key {key!r}.{near(name, [*state, *claimed])}"
            )
        if type(own) is not Tensor or not torch.equal(own.cpu(), tensor.to(own.dtype)):
            raise CheckpointError(
                f"{WEIGHTS}: {key!r} {list(tensor.shape)} is a tensor of the base itself, with "
                f"other values than the model's {list(own.shape)}; an adapter never changes its "
                "base. If it belongs there (a vocabulary that was resized), load it into the model "
                "first: model.load_state_dict({...}, strict=False)."
            )


def _check_adapter(
    params: Mapping[str, Any], paths: Sequence[str], fmt: Format, method: Any, model: Any
) -> None:
    try:
        at = method.at(paths)
        if model is not None:
            forward = bind(model, method)
            forward._check(params)
            for path, layer in forward.layers.items():
                fmt.fits(layer.base, path)
            check_aliases(paths, model)
            fmt.convert(dict(params), method, model)  # what will have to work when it is loaded
    except FadaptError as error:
        raise CheckpointError(f"not saved: {error}") from error
    for path, leaf in params.items():
        if not path:
            raise CheckpointError("PEFT cannot adapt a model that is itself the layer (path '').")
        tensors = dict(leaf) if path not in paths else fmt.pack(leaf)
        if path in paths:
            _unpack(path, tensors, fmt, at[path])
        for name, tensor in tensors.items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise CheckpointError(f"{path}.{name} is a {type(tensor).__name__}, not a tensor.")
    if model is not None:
        saved = sorted(beside(params, method)[0])
        wide = set(saved_by_peft(saved, model)) - params.keys()
        if wide:
            raise CheckpointError(
                f"modules_to_save={saved}: PEFT takes any module whose name ends so, also "
                f"{listing(sorted(wide))}."
            )
