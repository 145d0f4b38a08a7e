"""Second moments of each adapted layer's inputs, for rounding by the error of its outputs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        ``{path: float32 [in, in]}``. A layer of ``in`` inputs needs at least as many tokens for a
        matrix of full rank.

    Raises:
        AdapterError: no batch, or a layer that none of them reached.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2)
        >>> fadapt.calibrate(model, None, method, [torch.ones(8, 4)])[""].shape
        torch.Size([4, 4])
    """
    forward = bind(model, method)
    moments: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            total = moments.get(path)
            if total is None:
                moments[path] = rows.T @ rows
            else:
                total.addmm_(rows.T, rows)

        return hook

    for path, layer in forward.layers.items():
        # The shell's own dict is the copied layer's: the model's hooks are not touched.
        layer.register_forward_pre_hook(watch(path))
    for batch in batches:
        if isinstance(batch, Mapping):
            forward(params, **batch)
        else:
            forward(params, *(batch if isinstance(batch, tuple | list) else (batch,)))
    missing = sorted(forward.layers.keys() - moments.keys())
    if missing:
        raise AdapterError(f"calibrate: no batch reached the layers {missing[:4]}.")
    return moments
