"""PEFT's format for LoRA: ``lora_A``, ``lora_B`` and the options of ``LoraConfig``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bases import Conv, Dense, Embedding
from fadapt.errors import AdapterError, CheckpointError
from fadapt.lora import LoRA, LoRABiasParams, LoRAParams
from fadapt.lora_embedding import LoRAEmbeddingParams
from fadapt.peft_config import Format
from fadapt.shell import layers_of, read

_OPTIONS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}
# Settings of initialisations, and of options that are off.
_INERT = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    }
)
_OFF = {
    "use_dora": False,
    "use_qalora": False,
    "ensure_weight_tying": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "velora_config": None,
}
# PEFT's init_lora_weights -> ours. Those that leave the base alone say nothing about a trained
# adapter; pissa and olora move a part of the weight into it.
_INITS = {True: "kaiming", False: "kaiming", "eva": "kaiming", "mica": "kaiming"} | {
    name: name for name in ("gaussian", "orthogonal", "pissa", "olora")
}

# No ".weight": PEFT holds these two as bare parameters.
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


def _read(options: Mapping[str, Any], shared: dict[str, Any]) -> LoRA:
    init = options["init_lora_weights"]
    if init not in _INITS:
        raise CheckpointError(
            f"adapter_config.json: init_lora_weights={init!r} changed the base's own weights when "
            "the adapter was made, in a way that cannot be repeated from the checkpoint. Save it "
            "again from PEFT relative to the original weights: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)."
        )
    return LoRA(
        rank=options["r"],
        alpha=options["lora_alpha"],
        rslora=options["use_rslora"],
        dropout=options["lora_dropout"],
        lora_bias=options["lora_bias"],
        rank_pattern=options["rank_pattern"],
        alpha_pattern=options["alpha_pattern"],
        init=_INITS[init],
        **shared,
    )


def _write(method: LoRA, paths: Sequence[str]) -> dict[str, Any]:
    _check_bias(method)
    alphas = dict(method.alpha_pattern)
    if method.alpha is None:  # alpha is each layer's own rank
        alphas |= {k: r for k, r in method.rank_pattern.items() if k not in alphas}
    # PEFT takes a learned bias with its default initialisation alone; nothing is initialised here.
    init: str | bool = True if method.init == "kaiming" or method.lora_bias else method.init
    return {
        "r": method.rank,
        "lora_alpha": _number(method.rank if method.alpha is None else method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "lora_bias": method.lora_bias,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": {k: _number(a) for k, a in alphas.items()},
        "init_lora_weights": init,
    }


def _unpack(tensors: Mapping[str, Tensor], method: LoRA) -> Any:
    leaf: Any
    if ".lora_A.weight" not in tensors and any(suffix in tensors for suffix in _EMBEDDING):
        leaf = LoRAEmbeddingParams(*(tensors[suffix] for suffix in _EMBEDDING))
    else:
        A, B = tensors[".lora_A.weight"], tensors[".lora_B.weight"]
        if A.dim() == B.dim() > 2 and B.shape[2:].numel() == 1:
            B = B.flatten(1)  # of a convolution, a kernel of size 1
        bias = [tensors[".lora_B.bias"]] if method.lora_bias else []
        leaf = (LoRABiasParams if bias else LoRAParams)(A, B, *bias)
    A, B = leaf[:2]
    if B.dim() != 2 or A.shape[:1] != (method.rank,):
        raise AdapterError(
            f"{leaf._fields[0]} is {list(A.shape)}; by the options it is [{method.rank}, in] (rank "
            f"{method.rank} at this layer), for one adapter."
        )
    return leaf


def _pack(params: Any) -> dict[str, Tensor]:
    if isinstance(params, LoRAEmbeddingParams):
        return dict(zip(_EMBEDDING, params, strict=True))
    A, B = params[:2]
    tensors = {".lora_A.weight": A, ".lora_B.weight": B.reshape(*B.shape, *[1] * (A.dim() - 2))}
    if isinstance(params, LoRABiasParams):
        tensors[".lora_B.bias"] = params.lora_bias
    return tensors


def _convert(params: dict[str, Any], method: LoRA, model: nn.Module) -> tuple[dict[str, Any], LoRA]:
    """PiSSA and OLoRA: from relative to the residual, W - s B0 A0, to relative to W itself.

    ``s (B A - B0 A0)`` is an update of rank 2r: the conversion that PEFT makes in
    ``subtract_mutated_init``, with B0 and A0 computed again from W, as PEFT does when it loads.
    """
    if method.init not in ("pissa", "olora"):
        return params, method
    _check_bias(method)
    at = method.at(list(layers_of(model, method)))
    doubled = dict(params)
    for path, layer in layers_of(model, method).items():
        base = read(path, layer)
        if isinstance(base, Embedding):  # which PEFT leaves whole
            doubled[path] = LoRAEmbeddingParams(
                *(torch.cat([t, torch.zeros_like(t)], k) for k, t in enumerate(params[path]))
            )
            continue
        if not isinstance(base, Dense):
            raise CheckpointError(
                f"init_lora_weights={method.init!r}: such an adapter belongs to a residual that "
                f"PEFT computes from float weights, and layer {path!r} is a {type(base).__name__}. "
                "To load, use the float model, or save again from PEFT relative to the original "
                "weights (save_pretrained(folder, path_initial_model_for_weight_conversion=...)). "
                "To save, give dataclasses.replace(method, init='kaiming'), and load it over the "
                "residual state that it was trained on."
            )
        first, _ = replace(at[path], dtype=torch.float32).init_layer(base, None)
        A, B = params[path].lora_A, params[path].lora_B
        doubled[path] = LoRAParams(
            torch.cat([A, first.lora_A.to(A)]), torch.cat([B, -first.lora_B.to(B)], dim=1)
        )
    grow = math.sqrt(2) if method.rslora else 2  # keeps the scaling at twice the rank
    return doubled, replace(
        method,
        init="kaiming",
        rank=2 * method.rank,
        alpha=grow * (method.rank if method.alpha is None else method.alpha),
        rank_pattern={k: 2 * r for k, r in method.rank_pattern.items()},
        alpha_pattern={k: grow * a for k, a in method.alpha_pattern.items()},
    )


def _check_bias(method: LoRA) -> None:
    if method.init in ("pissa", "olora") and method.lora_bias:
        raise CheckpointError(
            f"PEFT has no lora_bias with init_lora_weights={method.init!r}. To save, give "
            "dataclasses.replace(method, init='kaiming'), and load it over the residual state that "
            "it was trained on."
        )


def _fits(base: Any, path: str) -> None:
    if isinstance(base, Conv) and (base.mode != "zeros" or set(base.dilation) != {1}):
        raise CheckpointError(
            f"layer {path!r}: PEFT slides a convolution's lora_A without the layer's dilation "
            f"{base.dilation} and padding_mode {base.mode!r}, and so gives other outputs than "
            "fadapt, and than the weight that it merges. Such an adapter cannot pass between them."
        )


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


FORMAT = Format(
    "LORA", LoRA, _OPTIONS, _INERT, _OFF,
    (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", *_EMBEDDING),
    _read, _write, _unpack, _pack, _convert, _fits,
)  # fmt: skip
