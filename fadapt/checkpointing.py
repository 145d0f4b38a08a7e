"""Activation checkpointing inside a shell: what is computed again in backward sees the adapter.

A model that checkpoints its blocks (transformers' ``activation_checkpointing_enable``) calls each
block once more during backward. By then the shell has given the adapter's tensors back, and the
block would compute as the base. So each block is called with the tensors that the shell held the
first time.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fadapt.errors import ConfigError
from fadapt.lending import Lender

_NAME = "_gradient_checkpointing_func"  # transformers' attribute on each block


def keep_adapter(shell: nn.Module, lender: Lender) -> None:
    """Make the blocks of a shell that checkpoint themselves keep its tensors for backward."""
    for module in shell.modules():
        given = vars(module).get(_NAME)
        if given is not None:
            inner = given.checkpoint if isinstance(given, _Checkpoint) else given
            setattr(module, _NAME, _Checkpoint(inner, lender))


def watch(shell: nn.Module, lender: Lender, paths: Iterable[str]) -> None:
    """Make these modules of a shell, whose own tensors an adapter replaces, raise where they are
    called outside of a forward, as an adapted layer does by itself."""
    for module in shell.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Watch)]:
            del hooks[key]  # of the forward whose shell this one's was copied from
    for path in paths:
        shell.get_submodule(path).register_forward_pre_hook(_Watch(lender, path))


class _Watch:
    """A hook, and no closure: a copy of the shell has a copy of it."""

    def __init__(self, lender: Lender, path: str):
        self.lender = lender
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.lender.check(self.path)


class _Checkpoint:
    """``checkpoint(function, *args)``, the function seeing its tensors when it is called again."""

    def __init__(self, checkpoint: Callable[..., Any], lender: Lender):
        self.checkpoint = checkpoint
        self.lender = lender

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "use_reentrant" in getattr(self.checkpoint, "keywords", {}):
            # The reentrant kind gives gradients to arguments alone, and parameters are none.
            kwargs["use_reentrant"] = False
        if torch.compiler.is_compiling() or not self.lender.running:
            return self.checkpoint(function, *args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise ConfigError(
                "this model checkpoints its blocks (training mode, gradients on), and torch.func's "
                "transforms have no place for what that keeps. For one adapter take "
                "fadapt.value_and_grad in place of torch.func.grad; for many at once, call "
                "model.gradient_checkpointing_disable() before bind."
            )
        tensors = self.lender.running[-1]
        first = True

        def run(*args: Any) -> Any:
            nonlocal first
            if first:  # still inside of the forward's own call
                first = False
                return function(*args)
            return self.lender.call(function, tensors, args, {})

        return self.checkpoint(run, *args, **kwargs)
