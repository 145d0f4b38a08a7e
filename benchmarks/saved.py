"""Memory for the benchmarks: what autograd keeps between a forward and its backward."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in a forward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        plain = tensor.qdata if hasattr(tensor, "qdata") else tensor
        storage = plain.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    del y
    return sum(storages.values())
