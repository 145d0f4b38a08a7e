"""What calibration inputs tell of each adapted layer: second moments, for rounding by the error of
its outputs; the largest magnitude, for formats that round the inputs too."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bases import is_linear
from fadapt.errors import AdapterError
from fadapt.functional import bind


@torch.no_grad()
def calibrate(
    model: nn.Module, params: Mapping[str, Any] | None, method: Any, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """``X^T X`` of each target layer's inputs, over batches that the adapted model runs.

    Args:
        model: only read.
        params: the adapter, so that a layer sees what the adapters before it make; or None.
        method: which layers.
        batches: each the model's input: a tensor, a tuple of positional ones, or a dict of keyword
            ones.

    Returns:
        ``{path: float32 [in, in]}`` of the linear ones among them. A layer of ``in`` inputs needs
        at least as many tokens for a matrix of full rank.

    Raises:
        AdapterError: no batch, or a layer that none of them reached.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2)
        >>> fadapt.calibrate(model, None, method, [torch.ones(8, 4)])[""].shape
        torch.Size([4, 4])
    """
    moments: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        total = moments.get(path)
        if total is None:
            moments[path] = rows.T @ rows
        else:
            total.addmm_(rows.T, rows)

    _watch("calibrate", model, params, method, batches, add)
    return moments


@torch.no_grad()
def input_amax(
    model: nn.Module, params: Mapping[str, Any] | None, method: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """The largest magnitude of each target layer's inputs, as INC's observer ``maxabs`` finds it.

    Args:
        model, params, method, batches: as :func:`calibrate`.

    Returns:
        ``{path: amax}``, which merging ``to="inc-fp8"`` needs.

    Raises:
        AdapterError: no batch, a layer that none of them reached, or NaN or Inf in its inputs.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2)
        >>> fadapt.input_amax(model, None, method, [-2 * torch.ones(8, 4), torch.ones(1, 4)])
        {'': 2.0}
    """
    found: dict[str, float] = {}

    def add(path: str, x: Tensor) -> None:
        largest = float(x.abs().max())
        if not math.isfinite(largest):
            raise AdapterError(f"input_amax: the inputs of layer {path!r} hold NaN or Inf.")
        found[path] = max(found.get(path, 0.0), largest)

    _watch("input_amax", model, params, method, batches, add)
    return found


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What a model is called with: a batch is a tensor, a tuple or a dict."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, tuple | list) else (batch,)), {}


def _watch(
    name: str,
    model: nn.Module,
    params: Mapping[str, Any] | None,
    method: Any,
    batches: Iterable[Any],
    add: Callable[[str, Tensor], None],
) -> None:
    """Tell ``add`` the input of each target layer, batch after batch."""
    forward, reached = bind(model, method), set()

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.add(path)
            add(path, args[0].detach())

        return hook

    linear = {p: layer for p, layer in forward.layers.items() if is_linear(layer.base_layer)}
    for path, layer in linear.items():
        # The shell's own dict is the copied layer's: the model's hooks are not touched.
        layer.register_forward_pre_hook(hook_of(path))
    for batch in batches:
        args, kwargs = arguments(batch)
        forward(params, *args, **kwargs)
    missing = sorted(linear.keys() - reached)
    if missing:
        raise AdapterError(f"{name}: no batch reached the layers {missing[:4]}.")
