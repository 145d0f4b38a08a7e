"""Activation checkpointing inside a shell: what is computed again in backward sees the adapter.

A model that checkpoints its blocks (transformers' ``activation_checkpointing_enable``) calls each
block once more during backward. By then ``functional_call`` has taken the parameters out of the
shell again, and the block would compute as the base. So each block is called with the tensors that
it held the first time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.errors import ConfigError

_NAME = "_gradient_checkpointing_func"  # transformers' attribute on each block


class _Call(nn.Module):
    """``functional_call`` for any function that runs ``owner``."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def keep_adapter(shell: nn.Module) -> None:
    """Make the blocks of a shell that checkpoint themselves keep their tensors for backward."""
    for module in shell.modules():
        given = vars(module).get(_NAME)
        if given is not None and not isinstance(given, _Checkpoint):
            setattr(module, _NAME, _Checkpoint(given, shell))


class _Checkpoint:
    """``checkpoint(function, *args)``, the function seeing its tensors when it is called again."""

    def __init__(self, checkpoint: Callable[..., Any], shell: nn.Module):
        self.checkpoint = checkpoint
        self.shell = shell

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if "use_reentrant" in getattr(self.checkpoint, "keywords", {}):
            # The reentrant kind gives gradients to arguments alone, and parameters are none.
            kwargs["use_reentrant"] = False
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise ConfigError(
                "this model checkpoints its blocks (training mode, gradients on), and torch.func's "
                "transforms have no place for what that keeps. For one adapter take "
                "fadapt.value_and_grad in place of torch.func.grad; for many at once, call "
                "model.gradient_checkpointing_disable() before bind."
            )
        owner = _owner(function, self.shell)
        tensors: dict[str, Tensor] = dict(owner.named_parameters(remove_duplicate=False))
        tensors |= dict(owner.named_buffers(remove_duplicate=False))
        named = {f"owner.{name}": tensor for name, tensor in tensors.items()}
        call = _Call(owner)

        def run(*args: Any) -> Any:
            return torch.func.functional_call(call, named, (function, *args), tie_weights=False)

        return self.checkpoint(run, *args, **kwargs)


def _owner(function: Callable[..., Any], shell: nn.Module) -> nn.Module:
    """The block that is called; all of the shell where the function does not tell."""
    while isinstance(function, partial):
        if function.args and isinstance(function.args[0], nn.Module):
            return function.args[0]
        function = function.func
    found = getattr(function, "__self__", function)
    return found if isinstance(found, nn.Module) else shell
