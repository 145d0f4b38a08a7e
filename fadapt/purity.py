"""``assert_pure``: a check that a call changed nothing, not a tensor and no global state."""

import ctypes
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

T = TypeVar("T")


def assert_pure(fn: Callable[[], T], *things: Any) -> T:
    """Call ``fn()``, and raise AssertionError if that changed anything.

    Watched are every byte of every tensor's whole storage in ``things`` (inside tensor subclasses
    too), ``requires_grad`` and ``grad``, the modules' trees, modes and hooks; and, without being
    named, the global random states, the default dtype and device, whether gradients are on, and
    every logger's level and handlers.

    Args:
        fn: takes no arguments.
        *things: modules, tensors, what ``bind`` returned, or any pytree of tensors.

    Returns:
        What ``fn`` returned.

    Raises:
        AssertionError: naming what changed.

    Example:
        >>> import torch, fadapt as fa
        >>> from fadapt.testing import assert_pure
        >>> model, method = torch.nn.Linear(4, 3), fa.LoRA(rank=2)
        >>> params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> forward, x = fa.bind(model, method), torch.ones(2, 4)
        >>> assert_pure(lambda: forward(params, x), model, forward, params, x).shape
        torch.Size([2, 3])
        >>> assert_pure(lambda: x.add_(1), x)
        Traceback (most recent call last):
        AssertionError: not pure: argument 0 changed: bytes
    """
    before = snapshot(*things)
    result = fn()
    after = snapshot(*things)
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    if changed:
        raise AssertionError(f"not pure: {', '.join(sorted(changed)[:8])}")
    return result


def snapshot(*things: Any) -> dict[str, Any]:
    """What :func:`assert_pure` compares, by name."""
    found: dict[str, Any] = {
        "the global random state changed": _digest(torch.get_rng_state())[1],
        "the default dtype changed": torch.get_default_dtype(),
        "the default device changed": torch.get_default_device(),
        "gradient mode changed": torch.is_grad_enabled(),
    }
    if torch.cuda.is_initialized():
        for k, state in enumerate(torch.cuda.get_rng_state_all()):
            found[f"the random state of cuda:{k} changed"] = _digest(state)[1]
    loggers = {"root": logging.root} | logging.root.manager.loggerDict
    for name, logger in loggers.items():
        if isinstance(logger, logging.Logger):
            handlers = tuple(logger.handlers)
            found[f"logger {name} changed"] = (logger.level, logger.disabled, handlers)
    for k, thing in enumerate(things):
        for name, value in _watch(thing):
            found[f"argument {k}{name}"] = value
    return found


def _watch(thing: Any) -> Iterator[tuple[str, Any]]:
    thing = getattr(thing, "shell", thing)
    if not isinstance(thing, nn.Module):
        leaves, spec = tree_flatten_with_path(thing)
        yield " changed: structure", str(spec)
        for key, leaf in leaves:
            if isinstance(leaf, Tensor):
                yield from _watch_tensor(keystr(key), leaf)
        return
    for path, module in thing.named_modules(remove_duplicate=False):
        where = f".{path}" if path else ""
        yield (
            f"{where} changed: mode, class or children",
            (
                type(module),
                module.training,
                [(name, id(child)) for name, child in module.named_children()],
            ),
        )
        yield (
            f"{where} changed: hooks",
            [tuple(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
        )
        # vars() holds parameters, buffers, and whatever a vendor keeps as a plain attribute.
        for name, value in vars(module).items():
            if name != "_modules" and not name.endswith("_hooks"):
                for key, leaf in tree_flatten_with_path(value)[0]:
                    label = f"{where}.{name}{keystr(key)}"
                    if isinstance(leaf, Tensor):
                        yield from _watch_tensor(label, leaf)
                    elif leaf is None or isinstance(leaf, bool | int | float | str):
                        yield f"{label} changed", leaf


def _watch_tensor(name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield (
        f"{name} changed: shape, dtype or strides",
        (
            type(tensor),
            tensor.shape,
            tensor.dtype,
            tensor.device,
            None if hasattr(tensor, "__tensor_flatten__") else tensor.stride(),
        ),
    )
    yield f"{name} changed: requires_grad", tensor.requires_grad
    grad = tensor.grad if tensor.is_leaf else None
    yield f"{name} changed: grad", None if grad is None else _digest(grad)
    yield f"{name} changed: bytes", _digest(tensor)


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return tuple((name, _digest(getattr(tensor, name))) for name in names)
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    host = storage.cpu()  # held until its bytes have been read
    content = ctypes.string_at(host.data_ptr(), size) if size else b""
    return (storage.data_ptr(), hashlib.sha256(content).hexdigest())
