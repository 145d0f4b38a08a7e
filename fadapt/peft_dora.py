"""PEFT's format for DoRA: LoRA's with ``use_dora`` and a ``lora_magnitude_vector``."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from fadapt import peft_lora
from fadapt.dora import DoRA, DoRAParams
from fadapt.errors import CheckpointError
from fadapt.lora import LoRAParams
from fadapt.peft_config import Format

# No ".weight": PEFT keeps a module there, and leaves its name out of the file.
_MAGNITUDE = ".lora_magnitude_vector"
_LORA = peft_lora.FORMAT


def _read(options: Mapping[str, Any], shared: dict[str, Any]) -> DoRA:
    lora = _LORA.read(options, shared)
    return DoRA(**{f.name: getattr(lora, f.name) for f in fields(lora)})


def _write(method: DoRA, paths: Sequence[str]) -> dict[str, Any]:
    return _LORA.write(method, paths) | {"use_dora": True}


def _unpack(tensors: Mapping[str, Tensor], method: DoRA) -> DoRAParams:
    A, B = _LORA.unpack(tensors, method)
    return DoRAParams(A, B, tensors[_MAGNITUDE])


def _pack(params: Any) -> dict[str, Tensor]:
    if not isinstance(params, DoRAParams):
        raise CheckpointError(
            f"not saved: a {type(params).__name__} is what was prepared of an adapter; save the "
            "adapter itself."
        )
    return _LORA.pack(LoRAParams(*params[:2])) | {_MAGNITUDE: params.lora_magnitude}


def _convert(params: dict[str, Any], method: DoRA, model: nn.Module) -> tuple[dict[str, Any], DoRA]:
    # Relative to W or to its residual, W + s B A is the same, and so are its norms.
    converted, again = _LORA.convert(params, method, model)
    for path, leaf in converted.items():
        if type(leaf) is LoRAParams:
            converted[path] = DoRAParams(*leaf, params[path].lora_magnitude)
    return converted, again


FORMAT = Format(
    "LORA", DoRA, {**_LORA.options, "use_dora": True}, _LORA.inert,
    {k: v for k, v in _LORA.off.items() if k != "use_dora"}, (*_LORA.suffixes[:2], _MAGNITUDE),
    _read, _write, _unpack, _pack, _convert,
)  # fmt: skip
