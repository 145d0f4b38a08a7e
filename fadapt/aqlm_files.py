"""Whole models of AQLM layers: made from a float model, and written as transformers loads them.

The folder is that of ``transformers/integrations/aqlm.py``: a ``quantization_config`` of the method
``aqlm``, and ``codes``, ``codebooks`` and ``scales`` in place of each linear's ``weight``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from aqlm import QuantizedLinear
from torch import Tensor, nn

from fadapt.bases.aqlm import aqlm_layer
from fadapt.bases.aqlm_fresh import encode
from fadapt.bases.protocol import base_of
from fadapt.errors import ConfigError, UnsupportedLayerError, listing
from fadapt.shell import share


def quantize_model(
    model: nn.Module,
    *,
    generator: torch.Generator,
    num_codebooks: int = 2,
    nbits_per_codebook: int = 8,
    in_group_size: int = 8,
    out_group_size: int = 1,
    second_moments: Mapping[str, Tensor] | None = None,
    rounds: int = 1,
    beam: int = 8,
) -> nn.Module:
    """A copy of ``model`` whose linear layers are ``aqlm.QuantizedLinear``.

    The output embedding stays as it is; so does all else, and shares its storage with the model.

    Args:
        model: left as it is.
        generator: draws the first vectors of each layer's codebooks.
        num_codebooks, nbits_per_codebook, in_group_size, out_group_size, rounds, beam: see
            :func:`fadapt.bases.aqlm_fresh.encode`.
        second_moments: ``{path of a linear: X^T X}``, each ``[in, in]``, of inputs whose outputs
            are to be kept; a layer that is not named is encoded by plain distance.

    Raises:
        ConfigError: no layer to quantize, or sizes that do not tile one of them.

    Example:
        >>> import torch
        >>> from fadapt.aqlm_files import quantize_model
        >>> g = torch.Generator().manual_seed(0)
        >>> small = quantize_model(
        ...     torch.nn.Sequential(torch.nn.Linear(16, 8)), nbits_per_codebook=3, generator=g)
        >>> small(torch.ones(2, 16)).shape
        torch.Size([2, 8])
    """
    moments = second_moments or {}
    output = _output_embedding(model)
    paths = [p for p, m in model.named_modules() if type(m) is nn.Linear and m is not output]
    if not paths:
        raise ConfigError(f"this {type(model).__name__} has no nn.Linear to quantize.")
    if unknown := sorted(set(moments) - set(paths)):
        raise ConfigError(f"second_moments: no nn.Linear to quantize at {listing(unknown)}.")
    copy = share(model, {})
    for path in paths:
        linear: Any = model.get_submodule(path)
        bias = linear.bias
        try:
            base = encode(
                linear.weight.detach(),
                None if bias is None else bias.detach(),
                num_codebooks=num_codebooks,
                nbits_per_codebook=nbits_per_codebook,
                in_group_size=in_group_size,
                out_group_size=out_group_size,
                second_moment=moments.get(path),
                rounds=rounds,
                beam=beam,
                generator=generator,
            )
        except ConfigError as error:
            raise ConfigError(f"layer {path!r}: {error}") from error
        copy.set_submodule(path, aqlm_layer(base).train(linear.training))
    return copy


def save_aqlm_model(model: Any, folder: str | Path) -> None:
    """Write a transformers model of AQLM layers so that ``from_pretrained(folder)`` brings it back.

    Codes are written in the order that files have, also those of layers that have run and so hold
    them permuted (a plain ``save_pretrained`` writes those as they lie, and they load wrong).

    Args:
        model: a ``PreTrainedModel``, as :func:`quantize_model` makes, left as it is.
        folder: made if need be.

    Raises:
        UnsupportedLayerError: no AQLM layer in it, or layers of several formats, of which
            transformers' configuration cannot tell.
    """
    from transformers import AqlmConfig

    layers = {p: m for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    formats = {
        (m.in_group_size, m.out_group_size, m.num_codebooks, m.nbits_per_codebook)
        for m in layers.values()
    }
    if len(formats) != 1:
        raise UnsupportedLayerError(
            f"this {type(model).__name__} has {len(layers)} AQLM layers, of {len(formats)} formats "
            f"{sorted(formats)} (in group, out group, codebooks, bits); a folder holds layers of "
            "exactly one."
        )
    in_group, out_group, books, bits = formats.pop()
    state = model.state_dict()
    for path, layer in layers.items():
        state |= {f"{path}.{name}": t for name, t in base_of(layer).state().items()}
    config = AqlmConfig(
        in_group_size=in_group,
        out_group_size=out_group,
        num_codebooks=books,
        nbits_per_codebook=bits,
        linear_weights_not_to_quantize=[
            p for p, m in model.named_modules() if isinstance(m, nn.Linear)
        ],
    )
    # save_pretrained writes to the configuration of what it saves: a copy, then.
    share(model, {}).save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    file = Path(folder) / "config.json"
    told = json.loads(file.read_text("utf-8")) | {"quantization_config": config.to_dict()}
    file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
