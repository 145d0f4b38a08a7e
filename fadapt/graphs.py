"""A pure step as one CUDA graph: small kernels without the time it takes to launch them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fadapt.errors import ConfigError

# Runs before the capture, in which kernels are chosen and workspaces allocated (torch's own
# make_graphed_callables takes 3 as well).
_WARMUP = 3


def cuda_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """``function``, captured once and replayed at every call.

    A step of small layers takes longer to launch than to run. What is pure can be captured as it
    is: a gradient step (``fadapt.value_and_grad``, ``vmap(grad(...))``), a mixed batch (with
    ``mixed.rows(...)`` in place of the ids), a prepared forward.

    Args:
        function: pure, of tensors on one GPU; it must not read a value of theirs in Python.
        *args, **kwargs: arguments like those of the calls to come: pytrees of the same structure,
            shapes and dtypes. Leaves that are no tensors are part of the graph.

    Returns:
        A function of the same arguments and results. Its inputs are copied into the graph's own
        memory, its results out of it: nothing that is given changes, and a result stays as it is
        when the next call comes. One call at a time.

    Raises:
        ConfigError: no GPU, a tensor elsewhere; and in a call, arguments unlike those captured.

    Source: CUDA graphs as in ``torch.cuda.graph``.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    devices = {t.device for t in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ConfigError(
            f"cuda_graph captures what runs on one GPU; these arguments lie on "
            f"{sorted(map(str, devices)) or 'no device'}. Move model, parameters and inputs there, "
            "or call the function as it is."
        )
    held = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    given, named = tree_unflatten(held, spec)
    (device,) = devices
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                function(*given, **named)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*given, **named)

    def replay(*args: Any, **kwargs: Any) -> Any:
        new, other = tree_flatten((args, kwargs))
        if other != spec:
            raise ConfigError(
                "cuda_graph: these arguments are built otherwise than those that were captured: "
                f"{other} in place of {spec}. Capture a graph for each form."
            )
        for mine, leaf in zip(held, new, strict=True):
            if not _alike(mine, leaf):
                raise ConfigError(
                    f"cuda_graph: captured with {_shown(mine)}, called with {_shown(leaf)}. "
                    "Capture a graph for each shape; pad a last, shorter batch."
                )
        for mine, leaf in zip(held, new, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(leaf)
        graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, result)

    return replay


def _alike(mine: Any, leaf: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(leaf, Tensor):
        return mine.shape == leaf.shape and mine.dtype == leaf.dtype and mine.device == leaf.device
    return type(mine) is type(leaf) and bool(mine == leaf)


def _shown(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {list(leaf.shape)} on {leaf.device}"
    return repr(leaf)
