"""What the forwards of a shell's modules set as they run, forgotten after each call: the longest
sequence so far, a mask that is made once, hooks."""

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_OF_ALL = vars(nn.Module()).keys() - {"training"}
# A module's __dict__, the names of its attributes, and what reads them.
_Held = tuple[dict[str, Any], tuple[str, ...], Callable[[Any], Any]]
_Before = tuple[int, list[_Held], list[tuple[int, Any]]]


class Attributes:
    """Of a shell's modules, but for torch's own and adapted layers, which set none."""

    def __init__(self, shell: nn.Module):
        self._shell = shell
        self._held = _held(shell)

    def now(self) -> _Before:
        """What :meth:`restore` takes."""
        try:
            each = [(len(held), get(held)) for held, _, get in self._held]
        except KeyError:  # one was deleted between two calls
            self._held = _held(self._shell)
            return self.now()
        return RemovableHandle.next_id, self._held, each

    def restore(self, before: _Before) -> None:
        """Put back what was changed or deleted since, and take out what was added."""
        hook, of, each = before
        for (held, keys, get), (size, values) in zip(of, each, strict=True):
            if not _same(held, get, size, values):
                lost = sum(key not in held for key in keys)
                for key in list(held)[size - lost :]:  # the new ones come last
                    del held[key]
                held.update(zip(keys, values, strict=True))
        if RemovableHandle.next_id != hook:
            self._remove_hooks(hook)

    def _remove_hooks(self, first: int) -> None:
        # transformers sets some where it is asked for hidden states, and an attribute that says so.
        for module in self._shell.modules():
            for name, held in vars(module).items():
                if "hooks" in name and isinstance(held, dict):
                    for key in [key for key in held if isinstance(key, int) and key >= first]:
                        del held[key]


def _same(held: dict[str, Any], get: Callable[[Any], Any], size: int, values: Any) -> bool:
    try:
        return len(held) == size and all(map(operator.is_, get(held), values))
    except KeyError:
        return False


def _held(shell: nn.Module) -> list[_Held]:
    found: list[_Held] = []
    for module in shell.modules():
        held = vars(module)
        if not type(module).__module__.startswith("torch.nn.") and "lender" not in held:
            keys = tuple(name for name in held if name not in _OF_ALL)
            if len(keys) > 1:  # more than `training`; of one key a getter would give no tuple
                found.append((held, keys, operator.itemgetter(*keys)))
    return found
