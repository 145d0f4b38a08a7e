"""Tensors lent to a shell for the time of one call: ``torch.func.functional_call``, for a caller
that calls often. It does the same, and looks each name up once.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fadapt.attributes import Attributes
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
        self._attributes: Attributes | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # No copy can be made of the one, and the others are parts of this one's shell.
        return vars(self) | {"_lock": None, "_places": {}, "_attributes": None}

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

        Whatever happens, the shell is afterwards as it was: what its modules' forwards set, such as
        the longest sequence seen, is forgotten too. (Not where torch.compile traces.)

        Args:
            function: the shell itself, where torch.compile or torch.export traces.
            tensors: by name, in place of the shell's own.

        Raises:
            AdapterError: another thread's call is running, whose tensors this one would see.
        """
        if torch.compiler.is_compiling():
            return self._traced(tensors, args, kwargs)
        if not self._lock.acquire(blocking=False):
            raise AdapterError(
                "this forward is running in another thread, and its shell holds that call's "
                "adapter. Bind a forward for each thread: they share the model's tensors."
            )
        if self._attributes is None:
            self._attributes = Attributes(self.shell)
        before = self._attributes.now()
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
            self._attributes.restore(before)
            self.running.pop()
            self._lock.release()

    def _traced(self, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        held = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        own = []
        try:
            for name in tensors.keys() - held.keys():  # a list of tensors, which no parameter is
                path, _, key = name.rpartition(".")
                module = self.shell.get_submodule(path)
                own.append((module, key, getattr(module, key)))
                setattr(module, key, tensors[name])
            return torch.func.functional_call(
                self.shell, held, args, dict(kwargs), tie_weights=False
            )
        finally:
            for module, key, value in own:
                setattr(module, key, value)

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


class Scratch:
    """Copies of what a forward may write to (running statistics), fresh for each call.

    Args:
        held: ``{name: a tensor, or a pytree with tensors}`` of the shell.
    """

    def __init__(self, held: Mapping[str, Any]):
        self._held = dict(held)
        self._wholes = _wholes(self._held)

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": self._held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_held"])  # type: ignore[misc]  # the copied tensors have other ids

    def fill(self, tensors: dict[str, Any]) -> None:
        """Add a copy of each to ``tensors``, unless its name is there. A tensor of two names has
        one copy, and what overlapped does so still."""
        copies: dict[int, Tensor] = {}
        for name, value in self._held.items():
            if name not in tensors:
                if isinstance(value, Tensor):
                    tensors[name] = self._copy(value, copies)
                else:
                    tensors[name] = tree_map(lambda leaf: self._copy(leaf, copies), value)

    def _copy(self, leaf: Any, copies: dict[int, Tensor]) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if id(leaf) not in copies:
            whole, start = self._wholes.get(id(leaf), (None, 0))
            if whole is None:
                copies[id(leaf)] = leaf.clone()
            else:
                if id(whole) not in copies:
                    copies[id(whole)] = whole.clone()
                copies[id(leaf)] = copies[id(whole)].as_strided(leaf.shape, leaf.stride(), start)
        return copies[id(leaf)]


def _wholes(held: Any) -> dict[int, tuple[Tensor, int]]:
    """``{id of a tensor: (the stretch of memory that it and others lie in, where it starts)}``, of
    those that overlap others."""
    spans: list[tuple[str, int, int, Tensor]] = []
    for tensor in {id(t): t for t in tree_leaves(held) if isinstance(t, Tensor)}.values():
        plain = tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
        if plain and tensor.numel():
            first = int(tensor.storage_offset())
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            memory = f"{tensor.untyped_storage()._cdata} {tensor.dtype}"
            spans.append((memory, first, first + int(last) + 1, tensor))
    groups: list[tuple[str, int, int, list[Tensor]]] = []
    for memory, first, stop, tensor in sorted(spans, key=lambda span: span[:3]):
        if groups and groups[-1][0] == memory and first < groups[-1][2]:
            _, start, end, each = groups.pop()
            groups.append((memory, start, max(end, stop), [*each, tensor]))
        else:
            groups.append((memory, first, stop, [tensor]))
    found: dict[int, tuple[Tensor, int]] = {}
    for _, first, stop, each in groups:
        if len(each) > 1:
            whole = each[0].as_strided((stop - first,), (1,), first)
            found |= {id(t): (whole, int(t.storage_offset()) - first) for t in each}
    return found
