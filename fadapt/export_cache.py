"""A decoder's KV cache as inputs and outputs of a graph, by the names of Optimum's exports:
``past_key_values.N.key`` and ``.value`` go in, ``present.N.key`` and ``.value`` come out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fadapt.batching import Mixed
from fadapt.errors import ConfigError
from fadapt.export_graph import PAST, Axes

_PREFIX = "past_key_values."
_PARTS = ("key", "value")
# Of the example: different, so that no two axes are taken for one.
_BATCH, _SEQUENCE, _PAST = 2, 3, 4


def decoder_inputs(mixed: Mixed, kv_cache: bool) -> tuple[dict[str, Tensor], Axes]:
    """A causal LM's inputs, an example of each, and their dynamic axes.

    Returns:
        ``input_ids [batch, sequence]`` and ``attention_mask``; with the cache also
        ``position_ids``, the mask is ``[batch, past + sequence]``, and for each layer there are
        ``past_key_values.N.key`` and ``.value``, ``[batch, heads, past, size]``.

    Raises:
        ConfigError: the model is no causal LM of transformers, or keeps another cache.
    """
    config = getattr(mixed.shell, "config", None)
    if config is None or not hasattr(mixed.shell, "generate"):
        raise ConfigError(
            f"{type(mixed.shell).__name__} is no causal LM of transformers: pass inputs= (an "
            "example of each) and dynamic=, and no kv_cache."
        )
    device = next(mixed.shell.parameters()).device
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64, device=device)
    rows = {0: "batch", 1: "sequence"}
    if not kv_cache:
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return both, dict.fromkeys(both, rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids.new_ones(_BATCH, _PAST + _SEQUENCE),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE, device=device).repeat(_BATCH, 1),
    }
    past = _example(mixed, ids.new_zeros(_BATCH, _PAST))
    axes: dict[str, dict[int, str]] = dict.fromkeys(inputs, rows)
    axes["attention_mask"] = {0: "batch", 1: f"{PAST} + sequence"}
    return inputs | past, axes | {name: {0: "batch", 2: PAST} for name in past}


def with_cache(run: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The model's call on flat inputs: the logits, then each layer's key and value."""
    past = [inputs.pop(name) for name in list(inputs) if name.startswith(_PREFIX)]
    output = run(**inputs, cache=_cache(past), use_cache=True)
    layers = output.cache.layers
    return [output.logits, *(t for layer in layers for t in (layer.keys, layer.values))]


def output_names(inputs: dict[str, Tensor]) -> list[str]:
    """Of what :func:`with_cache` returns."""
    past = [name for name in inputs if name.startswith(_PREFIX)]
    return ["logits", *(f"present.{name.removeprefix(_PREFIX)}" for name in past)]


def _cache(past: list[Tensor]) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _example(mixed: Mixed, ids: Tensor) -> dict[str, Tensor]:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    with torch.no_grad():
        output = mixed(None, None, input_ids=ids, use_cache=True)  # type: ignore[arg-type]
    found = getattr(output, "cache", None)
    layers = getattr(found, "layers", ())
    # In the graph every layer keeps all tokens: a window is in the attention's mask as well.
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if not layers or any(type(at) not in kinds or not at.is_initialized for at in layers):
        odd = sorted({type(at).__name__ for at in layers}) or [type(found).__name__]
        raise ConfigError(
            f"kv_cache: {type(mixed.shell).__name__} keeps {', '.join(odd)}, and a graph takes a "
            "key and a value [batch, heads, tokens, size] of each layer alone. Export without "
            "kv_cache."
        )

    def example(like: Tensor) -> Tensor:
        rows, heads, _, size = like.shape
        return like.new_zeros(rows, heads, _PAST, size)

    return {
        f"{_PREFIX}{n}.{part}": example(tensor)
        for n, layer in enumerate(layers)
        for part, tensor in zip(_PARTS, (layer.keys, layer.values), strict=True)
    }
