"""Tensors lent to a shell for the time of one call: ``torch.func.functional_call``, for a caller
that calls often. It does the same, and looks each name up once.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fadapt.errors import AdapterError


class Lender:
    """What puts tensors into one shell, and takes them out again.

    Attributes:
        shell: the module tree.
        running: what the shell holds in each of the calls that are running, the innermost last.
            Not used under torch.compile, which records the backward while the forward runs.
    """

    def __init__(self, shell: nn.Module):
        self.shell = shell
        self.running: list[Mapping[str, Any]] = []
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None}  # which no copy can be made of

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_lock": threading.RLock()})

    def call(
        self,
        function: Callable[..., Any],
        tensors: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """``function(*args, **kwargs)``, which runs the shell or a part of it.

        Whatever happens, the shell is afterwards as it was.

        Args:
            function: the shell itself, where torch.compile or torch.export traces.
            tensors: by name, in place of the shell's own.

        Raises:
            AdapterError: another thread's call is running, whose tensors this one would see.
        """
        if torch.compiler.is_compiling():
            held = dict(tensors)
            return torch.func.functional_call(
                self.shell, held, args, dict(kwargs), tie_weights=False
            )
        if not self._lock.acquire(blocking=False):
            raise AdapterError(
                "this forward is running in another thread, and its shell holds that call's "
                "adapter. Bind a forward for each thread: they share the model's tensors."
            )
        lent: list[tuple[dict[str, Any], str, Any]] = []
        self.running.append(tensors)
        try:
            for name, tensor in tensors.items():
                where, key = self._places.get(name) or self._place(name)
                lent.append((where, key, where[key]))
                where[key] = tensor
            return function(*args, **kwargs)
        finally:
            # Backwards: a tensor of two names was lent to one place twice.
            for where, key, own in reversed(lent):
                where[key] = own
            self.running.pop()
            self._lock.release()

    def check(self, path: str) -> None:
        """Raise AdapterError unless a call is running."""
        if not self.running:
            raise AdapterError(
                f"layer {path!r} was called outside of its forward, where it has no adapter: by a "
                "torch.utils.checkpoint inside the model, which calls its part again in backward? "
                "Checkpoint the whole forward instead, checkpoint(forward, params, x, "
                "use_reentrant=False), or by transformers' own activation checkpointing."
            )

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, key = name.rpartition(".")
        module = self.shell.get_submodule(path)
        for where in (module._parameters, module._buffers, vars(module)):
            if key in where:
                self._places[name] = where, key
                return where, key
        raise AdapterError(f"the shell has no tensor {name!r}.")
