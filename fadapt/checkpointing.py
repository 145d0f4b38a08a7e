"""Activation checkpointing inside a shell: what is computed again in backward sees the adapter.

A model that checkpoints its blocks (transformers' ``activation_checkpointing_enable``) calls each
block once more during backward. By then ``functional_call`` has taken the parameters out of the
shell again, and the block would compute as the base. So each block is called with the tensors that
the shell held the first time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.errors import AdapterError, ConfigError

_NAME = "_gradient_checkpointing_func"  # transformers' attribute on each block


class Calls:
    """The calls of a forward that are running, the innermost last: what the shell holds in each.

    Not used under torch.compile, which records the backward while the forward runs.
    """

    def __init__(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []

    @contextmanager
    def holding(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """While the shell is called with these tensors."""
        self.tensors.append(tensors)
        try:
            yield
        finally:
            self.tensors.pop()

    def check(self, path: str) -> None:
        """Raise AdapterError unless a forward is running."""
        if not self.tensors:
            raise AdapterError(
                f"layer {path!r} was called outside of its forward, where it has no adapter: by a "
                "torch.utils.checkpoint inside the model, which calls its part again in backward? "
                "Checkpoint the whole forward instead, checkpoint(forward, params, x, "
                "use_reentrant=False), or by transformers' own activation checkpointing."
            )


def keep_adapter(shell: nn.Module, calls: Calls) -> None:
    """Make the blocks of a shell that checkpoint themselves keep its tensors for backward."""
    for module in shell.modules():
        given = vars(module).get(_NAME)
        if given is not None:
            inner = given.checkpoint if isinstance(given, _Checkpoint) else given
            setattr(module, _NAME, _Checkpoint(inner, shell, calls))


class _Checkpoint:
    """``checkpoint(function, *args)``, the function seeing its tensors when it is called again."""

    def __init__(self, checkpoint: Callable[..., Any], shell: nn.Module, calls: Calls):
        self.checkpoint = checkpoint
        self.call = _Call(shell)
        self.calls = calls

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "use_reentrant" in getattr(self.checkpoint, "keywords", {}):
            # The reentrant kind gives gradients to arguments alone, and parameters are none.
            kwargs["use_reentrant"] = False
        if torch.compiler.is_compiling() or not self.calls.tensors:
            return self.checkpoint(function, *args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise ConfigError(
                "this model checkpoints its blocks (training mode, gradients on), and torch.func's "
                "transforms have no place for what that keeps. For one adapter take "
                "fadapt.value_and_grad in place of torch.func.grad; for many at once, call "
                "model.gradient_checkpointing_disable() before bind."
            )
        tensors = self.calls.tensors[-1]
        named = {f"shell.{name}": tensor for name, tensor in tensors.items()}
        first = True

        def run(*args: Any) -> Any:
            nonlocal first
            if first:  # still inside of the forward's own call
                first = False
                return function(*args)
            with self.calls.holding(tensors):
                return torch.func.functional_call(
                    self.call, named, (function, *args), tie_weights=False
                )

        return self.checkpoint(run, *args, **kwargs)


class _Call(nn.Module):
    """``functional_call`` for any function that runs a part of ``shell``."""

    def __init__(self, shell: nn.Module):
        super().__init__()
        self.shell = shell

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``."""
        return function(*args)
